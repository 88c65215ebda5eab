"""Train a classifier with a penalty on its input–output Jacobian: ``python train.py --help``."""

# An @hydra.main function. Hydra's tab completion looks for that word in this file.
from jacobian_robust.cli.train import main

if __name__ == "__main__":
    main()
