"""Attack trained classifiers and report what withstands: ``python evaluate.py --help``."""

import hydra
from omegaconf import DictConfig

from jacobian_robust.cli import door, run


@door
@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate as configured."""
    from jacobian_robust.evaluation import evaluate  # not at the top: --help and a misspelt option need no torch

    run(evaluate, cfg)


if __name__ == "__main__":
    main()
