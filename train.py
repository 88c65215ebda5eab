"""Train a classifier with a penalty on its input–output Jacobian: ``python train.py --help``."""

import hydra
from omegaconf import DictConfig

from jacobian_robust.cli import door, run


@door
@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train as configured."""
    return run("jacobian_robust.training.train.train", cfg)


if __name__ == "__main__":
    main()
