"""Train a classifier with a penalty on its input–output Jacobian: ``jacobian-robust train --help``."""

import hydra
from omegaconf import DictConfig

from jacobian_robust.cli.programs import entry_point, run
from jacobian_robust.files import config_directory

__all__ = ["main"]


def train(cfg: DictConfig) -> float | None:
    """Train as configured. Launchers of sweeps send it to other processes by this name."""
    return run("jacobian_robust.training.train.train", cfg)


main = entry_point(hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="train")(train))


if __name__ == "__main__":  # as Lightning starts further processes of ``jacobian-robust train``
    main()
