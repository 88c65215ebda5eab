"""Attack trained classifiers and report how robust they are: ``jacobian-robust evaluate --help``."""

import hydra
from omegaconf import DictConfig

from jacobian_robust.cli.programs import entry_point, run
from jacobian_robust.files import config_directory

__all__ = ["main"]


def evaluate(cfg: DictConfig) -> float | None:
    """Evaluate as configured. Launchers of sweeps send it to other processes by this name."""
    return run("jacobian_robust.evaluation.evaluate.evaluate", cfg)


main = entry_point(
    hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="evaluate")(evaluate)
)


if __name__ == "__main__":  # as Lightning starts further processes of ``jacobian-robust evaluate``
    main()
