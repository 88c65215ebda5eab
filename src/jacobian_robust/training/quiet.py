"""Lightning without its advertising."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advertising and hints that do not apply out of the way of the results."""
    loggers = [
        logging.getLogger(name)
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Batches are slices of a tensor in memory: workers would slow them down.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # A resumed run writes into a directory of its own.
            warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
            warnings.filterwarnings("ignore", message=".*returned `None`.*")  # a skipped step tells of itself
            # Nothing is logged by step.
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # The epoch's means are those of all devices before they are logged.
            warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
