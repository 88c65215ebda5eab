"""Weights & Biases: runs that close with the right status, and what is logged of an evaluation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import wandb
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError

from jacobian_robust.config import describe
from jacobian_robust.errors import UserError
from jacobian_robust.plots import accuracy_curve

__all__ = ["WandbOptions", "log_evaluation", "log_training", "read_logger", "wandb_run"]


class WandbOptions(BaseModel):
    """The ``logger`` group.

    Attributes:
        offline: write the run to the disk and talk to no server.
        project: W&B project.
        entity: W&B user or team; ``None`` for the account's default.
        group: what the run is shown under; ``None`` for the name of its directory, its twin pair's or its sweep's.
        tags: added to the run's own.
    """

    model_config = ConfigDict(extra="forbid")

    offline: bool = True
    project: str = "jacobian_robust"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


def read_logger(cfg: DictConfig) -> WandbOptions | None:
    """Return the options of the ``logger`` group, or ``None`` for ``logger=csv``.

    Raises:
        UserError: if one is unknown or of the wrong type.
    """
    if not cfg.get("logger"):
        return None
    try:
        return WandbOptions.model_validate(OmegaConf.to_container(cfg.logger, resolve=True))
    except ValidationError as error:
        raise UserError(describe(error, "logger")) from error


@contextlib.contextmanager
def wandb_run(
    options: WandbOptions | None,
    *,
    directory: Path,
    group: str,
    name: str,
    job_type: Literal["train", "evaluation"],
    tags: list[str],
    config: dict[str, Any],
) -> Iterator["wandb.Run | None"]:
    """Yield a W&B run that writes below ``directory`` and is finished with exit code 1 if the block raises.

    Args:
        options: the ``logger`` group; ``None`` yields no run.
        directory: where the offline run goes.
        group: what the run is shown under unless the options say otherwise.
        name: the run's name.
        job_type: the run's job type.
        tags: the run's tags.
        config: plain containers.
    """
    if options is None:
        yield None
        return
    try:
        run = _start(options, directory=directory, group=group, name=name, job_type=job_type, tags=tags, config=config)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"{describe(error, 'logger')}; logger=csv does without W&B") from error
    if job_type == "train":
        # Lightning's steps are optimizer steps; the epoch is what curves of different batch sizes share.
        run.define_metric("epoch", hidden=True)
        run.define_metric("*", step_metric="epoch")
    else:
        run.define_metric("robustness/accuracy/*", step_metric="robustness/eps")
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=0)


def _start(
    options: WandbOptions,
    *,
    directory: Path,
    group: str,
    name: str,
    job_type: str,
    tags: list[str],
    config: dict[str, Any],
) -> "wandb.Run":
    return wandb.init(
        project=options.project,
        entity=options.entity,
        group=options.group or group,
        name=name,
        job_type=job_type,
        tags=sorted({*tags, *options.tags}),
        config=config,
        dir=directory.resolve(),  # the writing process may have another working directory
        mode="offline" if options.offline else "online",
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off"),
    )


def log_training(run: "wandb.Run", curves: Figure, summary: dict[str, Any]) -> None:
    """Log what is known only at the end of a training: the curves as a picture, and the summary's scalars."""
    run.log({"curves": wandb.Image(curves)})
    run.summary.update({key: value for key, value in summary.items() if isinstance(value, int | float | str)})


def log_evaluation(
    run: "wandb.Run", report: dict[str, Any], rows: list[dict[str, Any]], figures: dict[str, Figure]
) -> None:
    """Log an evaluation: its budgets and sanity checks as tables, a line chart, the figures, and the accuracies.

    Args:
        run: the W&B run.
        report: what ``robustness.json`` holds.
        rows: the rows of ``robustness.csv``.
        figures: by name.
    """
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({"robustness/table": table})
    checks = [[model["name"], *check.values()] for model in report["models"] for check in model["checks"]]
    run.log({"sanity/checks": wandb.Table(columns=["model", "check", "status", "why"], data=checks)})
    run.summary.update({f"sanity/{model['name']}": model["verdict"] for model in report["models"]})
    curves = {model["name"]: accuracy_curve(model) for model in report["models"]}
    xs = [[eps for eps, _ in curve] for curve in curves.values()]
    ys = [[accuracy for _, accuracy in curve] for curve in curves.values()]
    chart = wandb.plot.line_series(xs, ys, keys=list(curves), title="Accuracy under attack", xname="eps")
    run.log({"robustness/curve": chart})
    for name, curve in curves.items():
        for eps, accuracy in curve:
            run.log({"robustness/eps": eps, f"robustness/accuracy/{name}": accuracy})
    run.log({f"figures/{name}": wandb.Image(figure) for name, figure in figures.items()})
    run.summary.update(
        {f"robust_accuracy/{name}/{eps:g}": accuracy for name, curve in curves.items() for eps, accuracy in curve}
    )
