"""Attack trained classifiers and report how robust they are: ``python evaluate.py --help``."""

# An @hydra.main function. Hydra's tab completion looks for that word in this file.
from jacobian_robust.cli.evaluate import main

if __name__ == "__main__":
    main()
