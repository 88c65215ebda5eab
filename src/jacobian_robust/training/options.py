"""The options of a training, and which of them shape what."""

import re
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError

from jacobian_robust.config import plain
from jacobian_robust.errors import UserError, describe
from jacobian_robust.evaluation.options import EVALUATION_GROUPS, EVALUATION_OPTIONS, Evaluation
from jacobian_robust.options import STRICT, Count, Flag, NonEmpty, Seed, Size
from jacobian_robust.penalties import Amortization
from jacobian_robust.robustness.metrics import TASK_METRICS

NOT_IN_CHECKPOINT = (
    *("output_dir", "ckpt_path", "resume", "checkpoints", "logger", "twin", "beside", "name", "objective"),
    "search",
    "cuda_graph",
    *("evaluate", "suite", *EVALUATION_GROUPS),
    *(option for option in EVALUATION_OPTIONS if option != "seed"),
)
"""Keys of the config that do not shape the trained network."""


GROUPS = (
    *("task", "data", "augmentation", "model", "regularizer", "adversary", "eta", "eps_schedule"),
    *("optimizer", "scheduler"),
    *("averaging", "trainer", "logger", *EVALUATION_GROUPS),
)


MAY_BE_NONE = ("augmentation", "regularizer", "adversary", "eps_schedule", "scheduler", "averaging")


MAY_DIFFER = (
    *("model", "regularizer", "adversary", "eta", "eps_schedule", "optimizer", "scheduler", "averaging", "trainer"),
)
"""Keys of the config in which runs side by side may differ."""


METRICS = (
    *("loss", "cross_entropy", "penalty", "accuracy"),
    *("jacobian_norm", "condition_satisfied", "robust_accuracy", "certified_accuracy"),
    *TASK_METRICS,
)
"""What is recorded of each split in each epoch."""


OPTIONAL = (
    *("eps_share", "multiplier"),
    *(f"{stage}_{name}" for stage in ("train", "validation") for name in ("certified_accuracy", *TASK_METRICS)),
)
"""What is recorded of an epoch where there is such a thing."""


COLUMNS = (
    *("epoch", "eta", "lr", "eps_share", "multiplier"),
    *(f"{stage}_{name}" for stage in ("train", "validation") for name in METRICS),
    *("skipped_steps", "seconds"),
)
"""Of ``metrics.csv``."""


UNRECORDED = ("resume", "processes", "cuda_graph")
"""Keys of the config that do not shape the results: a run may be resumed with others."""


SET_HERE = (
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "fast_dev_run",
    "inference_mode",
    "logger",
    "num_sanity_val_steps",
    "overfit_batches",
    "use_distributed_sampler",
)
"""Arguments of Lightning's Trainer that are not the user's to choose."""


class TrainerOptions(BaseModel):
    """What Lightning would accept of its Trainer's arguments and choke on later, or do something else with."""

    model_config = ConfigDict(strict=True, extra="allow")

    max_epochs: Count
    gradient_clip_val: PositiveFloat | None = None  # a negative one would turn the gradient round
    max_steps: int = Field(-1, ge=-1, lt=2**31)
    min_steps: Count | None = None
    min_epochs: Count | None = None
    check_val_every_n_epoch: Count | None = 1
    accumulate_grad_batches: Count = 1
    val_check_interval: Annotated[float, Field(gt=0, le=1)] | Count | None = None
    log_every_n_steps: Size | None = None
    reload_dataloaders_every_n_epochs: Size = 0


class Intervals(BaseModel):
    """How often a checkpoint is written beside the one at the end of each epoch.

    Attributes:
        every_steps: after so many optimizer steps; ``None`` for not by steps.
        every_seconds: after so many seconds; ``None`` for not by time.
    """

    model_config = STRICT

    every_steps: Count | None = None
    every_seconds: PositiveFloat | None = 60.0


class Search(BaseModel):
    """Which trial of which study a training is; it is none without a number."""

    model_config = STRICT

    storage: NonEmpty | None
    study: NonEmpty | None
    trial: Size | None
    pruner: dict[str, Any] | None


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,=+-]*$")]


class Options(BaseModel):
    """The scalars of ``conf/train.yaml``."""

    seed: Seed
    twin: Flag
    beside: Annotated[dict[Name, dict[str, Any]], BeforeValidator(lambda runs: runs or {})]  # null, as by ~beside: none
    evaluate: Flag
    ckpt_path: NonEmpty | None
    resume: Flag
    checkpoints: Intervals
    monitor_images: Size
    monitor_attack_images: Size
    objective: NonEmpty | None
    search: Search
    output_dir: NonEmpty
    amortization: Amortization
    cuda_graph: Flag | Literal["auto"]
    name: Name | None


def trainer_options(cfg: DictConfig) -> TrainerOptions:
    """Return the checked arguments of Lightning's Trainer; raise a UserError for a wrong one."""
    if not isinstance(cfg.get("trainer"), DictConfig):
        raise UserError("trainer is empty: choose one, trainer=NAME, of those in conf/trainer")
    try:
        return TrainerOptions.model_validate(plain(cfg.trainer))
    except ValidationError as error:
        raise UserError(describe(error, "trainer")) from error


def check_objective(objective: str, options: Options, evaluation: Evaluation | None) -> None:
    """Raise a UserError unless a training returns this metric: a sweep would see nan and say nothing."""
    attacks = [attack for attack in evaluation.attacks if not attack.eps_linf] if evaluation is not None else []
    attacked = [f"robust_accuracy_{attack.norm}_{eps:g}" for attack in attacks for eps in attack.eps]
    known = [*COLUMNS, *dict.fromkeys(attacked)]
    if objective not in known and not (options.twin and objective.removeprefix("twin_") in known):
        raise UserError(f"objective={objective}: a search goes by one of {', '.join(known)}")
    if objective.endswith("robust_accuracy") and not options.monitor_attack_images:
        raise UserError(f"objective={objective} needs monitor_attack_images, the number of images to attack, as 500")


def label(cfg: DictConfig) -> str:
    """Return the short name of what distinguishes a run: its penalty and its adversary, as ``linear_margin+pgd``.

    A run without either is ``vanilla``, the note's word.
    """
    chosen = [cfg[group] for group in ("regularizer", "adversary") if cfg[group]]
    classes = [str(group.get("_target_", "")).rpartition(".")[-1] for group in chosen]
    names = [re.sub(r"(?<=[a-z])(?=[A-Z][a-z]{2})", "_", name).lower() for name in classes]  # GloRo is one word
    return "+".join(names) or "vanilla"
