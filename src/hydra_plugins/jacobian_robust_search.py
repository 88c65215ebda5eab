"""Hydra's sweeper with a current Optuna: ``hydra/sweeper=jacobian_robust_search``, part of ``hparams_search=optuna``.

Hydra finds its plugins in this namespace package, and imports them whenever it starts. The published plugin
(hydra-optuna-sweeper 1.3) is bound to Optuna 2 and cannot prune.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from jacobian_robust.cli.sweeps import Job, read_job
from jacobian_robust.errors import UserError
from jacobian_robust.files import from_here, locked, write_atomically
from jacobian_robust.options import STRICT, Count, NonEmpty

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

__all__ = ["OptunaSearch", "distribution"]


@dataclass(config=ConfigDict(arbitrary_types_allowed=True, **STRICT), kw_only=True)
class OptunaSearch(Sweeper):
    """Searches for the options with the best ``objective``, the metric that a job returns.

    The trials are kept in a study. With the same ``hydra.sweep.dir`` and ``resume=true`` the search continues until
    there are ``trials`` of them; interrupted ones are finished first.
    """

    trials: Count  # those of earlier runs included
    batch: Count  # trials that are given to Hydra's launcher together
    direction: Literal["maximize", "minimize"]  # of the objective
    sampler: Any  # Optuna's
    params: Any  # the search space by option, see distribution
    study: NonEmpty  # its name
    storage: NonEmpty | None  # a file or the URL of a database; None for study.journal in the sweep's directory

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job needs."""
        self.config: DictConfig = config
        self.hydra_context = hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are missing.

        Raises:
            UserError: if the search space or the storage is at fault, or another process is at this search.
        """
        from optuna.samplers import BaseSampler

        if not isinstance(self.sampler, BaseSampler):
            raise UserError("hydra.sweeper.sampler: give a _target_ of Optuna's, as optuna.samplers.TPESampler")
        if self.config.get("objective") is None:
            raise UserError("objective: name the metric to search by, as validation_robust_accuracy")
        space, fixed = self._space(arguments)
        directory = Path(self.config.hydra.sweep.dir).absolute()
        storage = self.storage or str(directory / "study.journal")
        if Path(storage).exists() and not self.config.get("resume"):
            raise UserError(
                f"{from_here(storage)} is there already: resume=true goes on with it; or choose another hydra.sweep.dir"
            )
        with locked(directory / "search.lock"):
            self._search(space, fixed, directory, storage)

    def _space(self, arguments: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
        """Return the search space, and the overrides that are fixed."""
        space = {name: distribution(name, text) for name, text in self.params.items()}
        fixed: list[str] = []
        for override in OverridesParser.create().parse_overrides(arguments):
            name = override.get_key_element()
            if override.is_sweep_override():
                space[name] = distribution(name, override.get_value_string())
            else:
                fixed.append(str(override.input_line))
                space.pop(name, None)
        if not space:
            raise UserError(
                "hydra.sweeper.params is empty: name options and where to look, as eta.max=interval(0.002,0.2)"
            )
        return space, fixed

    def _search(self, space: Mapping[str, "BaseDistribution"], fixed: list[str], directory: Path, storage: str) -> None:
        from optuna.trial import TrialState

        from jacobian_robust.training.search import open_study  # not at the top: it needs torch, and --help does not

        study = open_study(storage, self.study, direction=self.direction, sampler=self.sampler)
        interrupted = study.get_trials(states=[TrialState.RUNNING])
        missing = self.trials - len(study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]))
        for first in range(0, missing, self.batch):
            number = min(self.batch, missing - first)
            batch = [interrupted.pop(0) if interrupted else _ask(study, space) for _ in range(number)]
            kept = [f"search.study={self.study}", f"search.storage='{storage}'"]
            jobs = [
                [*fixed, *(f"{name}={value}" for name, value in t.params.items()), f"search.trial={t.number}", *kept]
                for t in batch
            ]
            self.validate_batch_is_legal(jobs)
            returns = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
            for trial, returned in zip(batch, returns, strict=True):
                job = read_job(Path(returned.hydra_cfg.hydra.runtime.output_dir)) if returned.hydra_cfg else None
                _tell(study, trial.number, job, self.config.objective)
        _report(study, directory)


def _ask(study: "optuna.Study", space: Mapping[str, "BaseDistribution"]) -> "optuna.Trial":
    try:
        return study.ask(dict(space))
    except ValueError as error:
        raise UserError(f"hydra.sweeper.params: not the space that this search began with ({error})") from error


def _tell(study: "optuna.Study", number: int, job: Job | None, objective: str) -> None:
    """Tell the study a trial's result; an interrupted one stays open, to be finished another time."""
    from optuna.trial import TrialState

    status, value = (job.status, job.metrics.get(objective, math.nan)) if job is not None else ("failed", math.nan)
    if status == "pruned":
        study.tell(number, state=TrialState.PRUNED)
    elif status in ("finished", "failed"):
        study.tell(number, None if math.isnan(value) else value, TrialState.FAIL if math.isnan(value) else None)


def _report(study: "optuna.Study", directory: Path) -> None:
    """Say which trial was the best, and write its options into ``best.yaml``."""
    from optuna.trial import TrialState

    if not study.get_trials(states=[TrialState.COMPLETE]):
        return
    best = study.best_trial
    with write_atomically(directory / "best.yaml") as file:
        file.write(OmegaConf.to_yaml({"trial": best.number, "value": best.value, "options": best.params}))
    options = " ".join(f"{name}={value}" for name, value in best.params.items())
    print(f"best: {best.value:.4f} by trial {best.number}, {options} → {from_here(directory)}/best.yaml", flush=True)


def distribution(name: str, text: str) -> "BaseDistribution":
    """Return the values to search for an option.

    Args:
        name: of the option.
        text: in Hydra's notation: ``interval(a, b)`` for a number in [a, b], ``int(interval(a, b))`` for an integer,
            ``tag(log, …)`` of either for a logarithmic scale; ``range(a, b)``, ``choice(a, b)`` or ``a,b`` for values
            that have no order.

    Raises:
        UserError: if it is none of these.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
        sweep = override.value()
        if isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None:
            log = "log" in sweep.tags
            if isinstance(sweep.start, int) and isinstance(sweep.end, int):
                return IntDistribution(sweep.start, sweep.end, log=log)
            return FloatDistribution(sweep.start, sweep.end, log=log)
        if override.is_discrete_sweep():
            return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (HydraException, ValueError) as error:
        raise UserError(f"{name}={text}: {' '.join(str(error).split())}") from error
    raise UserError(
        f"{name}={text}: say where to look, as interval(0.002,0.2), tag(log,interval(0.002,0.2)) or choice(1,2)"
    )
