"""Attack trained classifiers and report what withstands: ``python evaluate.py --help``."""

import hydra
from omegaconf import DictConfig

from jacobian_robust.cli import door, run


@door
@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Evaluate as configured."""
    return run("jacobian_robust.evaluation.evaluate.evaluate", cfg)


if __name__ == "__main__":
    main()
