"""A trial of a hyper-parameter search, seen from its training: what it reports to Optuna, and when it is pruned."""

from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.pruners import BasePruner
from optuna.storages.journal import JournalFileBackend

from jacobian_robust.training.callbacks import EpochRecord

__all__ = ["Pruning", "open_study"]


def open_study(storage: str, name: str, **options: Any) -> optuna.Study:
    """Return a study that is kept on the disk or in a database; it is made if need be.

    Args:
        storage: URL of a database, as ``sqlite:///FILE`` or ``postgresql://…``; or a file, a journal that many
            processes, also on a shared file system, can write.
        name: of the study.
        options: of ``optuna.create_study``.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = storage if "://" in storage else optuna.storages.JournalStorage(JournalFileBackend(storage))
    return optuna.create_study(storage=kept, study_name=name, load_if_exists=True, **options)


class Pruning(pl.Callback):
    """Reports an epoch's objective to the study, and ends the training where the study's pruner sees no promise.

    Args:
        storage: where the study is kept.
        study: its name.
        trial: the trial's number.
        pruner: says whether to go on.
        record: of the epochs.
        objective: the column of the record that is reported.

    Attributes:
        pruned: whether the training was ended.
    """

    def __init__(
        self, storage: str, study: str, trial: int, pruner: BasePruner, record: EpochRecord, objective: str
    ) -> None:
        self.study = open_study(storage, study, pruner=pruner)
        # Optuna has no other way to a trial that another process began.
        self.trial = optuna.Trial(self.study, self.study.trials[trial]._trial_id)
        self.record = record
        self.objective = objective
        self.pruned = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, and ask whether to go on."""
        epoch = trainer.current_epoch + 1
        pruned = False
        if trainer.is_global_zero:
            if epoch not in self.study.trials[self.trial.number].intermediate_values:  # a resumed run may repeat itself
                self.trial.report(self.record.rows[-1][self.objective], epoch)
            pruned = epoch != trainer.max_epochs and self.trial.should_prune()
        if trainer.strategy.broadcast(pruned):
            self.pruned = trainer.should_stop = True
