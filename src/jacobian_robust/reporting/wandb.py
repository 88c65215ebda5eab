"""Weights & Biases: runs that close with the right status, and what is logged of an evaluation."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import wandb
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from jacobian_robust.attacks import Norm
from jacobian_robust.errors import UserError, describe
from jacobian_robust.options import STRICT, Listed, NonEmpty
from jacobian_robust.reporting.certificates import certified_table
from jacobian_robust.reporting.figures import NORMS, Points, Rows, headline, on_log_axes, suffix_of, unmet_note
from jacobian_robust.robustness.schema import Condition, Group, Model, Results

__all__ = ["WandbOptions", "full_id", "log_evaluation", "log_training", "read_logger", "wandb_run"]


class WandbOptions(BaseModel):
    """The ``logger`` group.

    Attributes:
        offline: write the run to the disk and talk to no server.
        project: W&B project.
        entity: W&B user or team; ``None`` for the account's default.
        group: what the run is shown under; ``None`` for the name of its directory, its twin pair's or its sweep's.
        tags: added to the run's own.
    """

    model_config = STRICT

    offline: bool = True
    project: NonEmpty = "jacobian_robust"
    entity: NonEmpty | None = None
    group: NonEmpty | None = None
    tags: Annotated[tuple[NonEmpty, ...], Listed] = ()


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
    job_type: Literal["train", "evaluation", "comparison"],
    tags: list[str],
    config: dict[str, Any],
    notes: str = "",
    resumed: str | None = None,
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
        notes: shown with the run.
        resumed: the run to go on with, as ``entity/project/id`` or ``project/id``; ``None`` for a new one.
    """
    if options is None:
        yield None
        return
    identity = resumed.rpartition("/")[-1] if resumed else None
    if job_type != "train" and identity is None:  # the run that a W&B agent asks for is the training's
        identity = uuid.uuid4().hex[:8]
    try:
        run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group or group,
            name=name,
            job_type=job_type,
            tags=sorted({*tags, *options.tags}),
            config=config,
            notes=notes or None,
            id=identity,
            resume="allow" if resumed else None,
            dir=directory.resolve(),  # the writing process may have another working directory
            mode="offline" if options.offline else "online",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"{describe(error, 'logger')}; logger=csv does without W&B") from error
    if job_type == "train":
        # Lightning's steps are optimizer steps; the epoch is what curves of different batch sizes share.
        run.define_metric("epoch", hidden=True)
        run.define_metric("*", step_metric="epoch")
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=0)


def full_id(run: "wandb.Run") -> str:
    """Return what finds a run again: ``entity/project/id``, or ``project/id`` where no entity is known."""
    return "/".join(filter(None, (run.entity, run.project, run.id)))


def log_training(run: "wandb.Run", curves: Path, summary: dict[str, Any], rows: Rows, twin: Rows | None) -> None:
    """Log what is known only at the end of a training: the curves as a picture, the summary's scalars and the cost.

    Args:
        run: the W&B run.
        curves: PNG file.
        summary: as ``summary.json`` has it.
        rows: the rows of ``metrics.csv``.
        twin: those of the undefended twin, whose cost the run's is compared with.
    """
    run.log({"curves": wandb.Image(str(curves))})
    run.summary.update({key: value for key, value in summary.items() if isinstance(value, int | float | str)})
    cost, of_twin = (_seconds_per_epoch(of) for of in (rows, twin or ()))
    if cost:
        run.summary["seconds_per_epoch"] = cost
    if cost and of_twin:
        run.summary["cost_over_twin"] = cost / of_twin


def _seconds_per_epoch(rows: Rows) -> float | None:
    """Return the mean time of the training steps of an epoch."""
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    return sum(seconds) / len(seconds) if seconds else None


def log_evaluation(
    run: "wandb.Run",
    results: Results,
    alike: Sequence[Group],
    rows: list[dict[str, Any]],
    points: Points,
    figures: Mapping[str, Path],
    report: Path,
) -> None:
    """Log an evaluation: tables, charts over the budget, the figures, the report, and the accuracies as a summary.

    Args:
        run: the W&B run.
        results: the evaluation.
        alike: models that differ in their training seed alone.
        rows: the rows of ``robustness.csv``.
        points: what the geometry predicts at each image, and what was found there.
        figures: PNG files by name.
        report: the HTML file.
    """
    run.log({"robustness/table": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})
    checks = [[model.name, check.name, check.status, check.why] for model in results.models for check in model.checks]
    run.log({"sanity/checks": wandb.Table(columns=["model", "check", "status", "why"], data=checks)})
    run.summary.update({_key("sanity", model.name): model.verdict for model in results.models})
    first = results.models[0].seconds_per_epoch
    for model in results.models:
        if model.seconds_per_epoch:
            run.summary[_key("training", model.name, "seconds_per_epoch")] = model.seconds_per_epoch
            if first and len(results.models) > 1:
                run.summary[_key("training", model.name, "cost_over_first")] = model.seconds_per_epoch / first
    for norm in results.norms:
        _log_curves(run, results, norm)
        _log_certified(run, results, norm)
    for model in results.models:
        for name, value in model.task.metrics.items() if model.task else ():
            run.summary[_key("clean", model.name, name)] = value
    _log_seeds(run, alike)
    _log_classes(run, results.models)
    _log_geometry(run, results.models, points)
    _log_beyond(run, results.models)
    run.log({_key("figures", name): wandb.Image(str(file)) for name, file in figures.items()})
    run.log({"report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)})


def _key(*parts: str) -> str:
    """Return the name of a metric: in one, W&B takes a point for nesting."""
    return "/".join(parts).replace(".", "_")


def _log_curves(run: "wandb.Run", results: Results, norm: Norm) -> None:
    """Log a chart of this run's models over the budget, and the same points as lines that runs can share."""
    curves = {model.name: model.accuracy(norm) for model in results.models}
    title = f"{headline(results.right)} under attack, {NORMS[norm]}"
    chart = wandb.plot.line_series(
        [[eps for eps, _ in curve] for curve in curves.values()],
        [[accuracy for _, accuracy in curve] for curve in curves.values()],
        keys=list(curves),
        title="; ".join(filter(None, (title, unmet_note(results, norm)))),
        xname="eps",
    )
    run.log({f"robustness/curve_{norm}": chart})
    run.define_metric(f"robustness/accuracy_{norm}/*", step_metric=f"robustness/eps_{norm}")
    for name, curve in curves.items():
        for eps, accuracy in curve:
            run.log({f"robustness/eps_{norm}": eps, _key(f"robustness/accuracy_{norm}", name): accuracy})
            run.summary[_key(f"robust_accuracy_{norm}", name, f"{eps:g}")] = accuracy


def _log_certified(run: "wandb.Run", results: Results, norm: Norm) -> None:
    """Log certified accuracy beside accuracy under attack: a table, and each certificate's share as a summary."""
    table = certified_table(results, norm)
    if table is None:
        return
    data = [[name, eps, *shares] for name, eps, shares in table.rows]
    columns: list[str | int] = ["model", "eps", *(column.replace(" ", "_") for column in table.columns)]
    run.log({f"certified/{norm}": wandb.Table(columns=columns, data=data)})
    for model in results.models:
        for eps, share in model.certified(norm):
            run.summary[_key(f"certified_accuracy_{norm}", model.name, f"{eps:g}")] = share
        for said in model.certificates:
            for budget in said.budgets if said.norm == norm else ():
                key = _key(f"certified_{said.certificate}", model.name, f"{budget.eps:g}")
                run.summary[key] = budget.certified_accuracy


def _log_seeds(run: "wandb.Run", alike: Sequence[Group]) -> None:
    """Log the mean and the standard deviation over training seeds, if there are several."""
    spreads = [
        [group.name, len(group.seeds), norm, eps, *shares]
        for group in alike
        for norm, budgets in group.robust.items()
        for eps, shares in {
            0.0: (*group.clean, 1.0, 0.0),
            **{
                eps: (mean, spread, *(share or (None, None)))
                for (eps, mean, spread), share in zip(budgets, group.of_correct[norm], strict=True)
            },
        }.items()
    ]
    columns: list[str | int] = ["models", "seeds", "norm", "eps", "mean_accuracy", "standard_deviation"]
    columns += ["mean_of_correct", "standard_deviation_of_correct"]
    if spreads:
        run.log({"robustness/seeds": wandb.Table(columns=columns, data=spreads)})


def _log_classes(run: "wandb.Run", models: Sequence[Model]) -> None:
    """Log accuracy by class: a bar chart clean and one for each norm and budget, and all of the latter as a table."""
    if not models[0].classes:
        return
    robust = []
    _log_bars(run, "clean", "Clean accuracy by class", models, [[c.clean_correct for c in m.classes] for m in models])
    for number, threat in enumerate(models[0].threats):
        for i, budget in enumerate(threat.budgets):
            name = f"{threat.norm}_{budget.eps:g}"
            title = f"Accuracy by class, {NORMS[threat.norm]} {budget.eps:g}"
            counts = [[c.robust_correct[m.threats[number].norm][i] for c in m.classes] for m in models]
            rows = _log_bars(run, name, title, models, counts)
            robust += [[model, threat.norm, budget.eps, *rest] for model, _, *rest in rows]
    columns: list[str | int] = ["model", "norm", "eps", "class", "images", "accuracy"]
    run.log({"classes/robust": wandb.Table(columns=columns, data=robust)})


def _log_bars(
    run: "wandb.Run", name: str, title: str, models: Sequence[Model], correct: Sequence[Sequence[int]]
) -> list[list[Any]]:
    """Log a bar for each model and class, and return their rows."""
    rows = [
        [
            model.name,
            f"{model.name}: {c.called}" if len(models) > 1 else c.called,
            c.label,
            c.images,
            count / c.images,
        ]
        for model, counts in zip(models, correct, strict=True)
        for c, count in zip(model.classes, counts, strict=True)
        if c.images
    ]
    table = wandb.Table(columns=["model", "label", "class", "images", "accuracy"], data=rows)
    run.log({_key("classes", name): wandb.plot.bar(table, "label", "accuracy", title=title)})
    return rows


def _log_geometry(run: "wandb.Run", models: Sequence[Model], points: Points) -> None:
    """Log the geometry's prediction against what was found, a point an image, and the note's condition as a table."""
    for name, (predicted, found) in points.items():
        shown = on_log_axes(predicted, found)
        lengths = (predicted[shown], found[shown], predicted[shown].log10(), found[shown].log10())
        images = shown.nonzero().flatten()
        rows = [list(row) for row in zip(*(column.tolist() for column in (images, *lengths)), strict=True)]
        table = wandb.Table(columns=["image", "predicted", "found", "log10_predicted", "log10_found"], data=rows)
        title = f"{name}: predicted radius d_B/‖J‖₂ against the smallest ℓ2 perturbation found, {len(rows)} images"
        scatter = wandb.plot.scatter(table, "log10_predicted", "log10_found", title=title)  # it has no log axes
        run.log({_key("first_order", f"scatter{suffix_of(name, len(models))}"): scatter})
    measured = [(model.name, model.first_order) for model in models if model.first_order]
    for name, found_there in measured:
        values = found_there.model_dump(exclude={"conditions"})
        run.summary.update({_key("first_order", name, key): value for key, value in values.items()})
    conditions = [[name, *c.model_dump().values()] for name, found_there in measured for c in found_there.conditions]
    columns: list[str | int] = ["model", *Condition.model_fields]
    if conditions:
        run.log({"first_order/conditions": wandb.Table(columns=columns, data=conditions)})


def _log_beyond(run: "wandb.Run", models: Sequence[Model]) -> None:
    """Log calibration, noise and images of another kind, as tables and charts of their own."""
    for model in models:
        if model.calibration:
            for key in ("ece", "nll", "brier"):
                run.summary[_key("calibration", model.name, key)] = getattr(model.calibration, key)
    if not models[0].calibration:
        return
    noise = wandb.plot.line_series(
        [[point.sigma for point in model.noise] for model in models],
        [[point.accuracy for point in model.noise] for model in models],
        keys=[model.name for model in models],
        title="Accuracy under Gaussian noise",
        xname="sigma",
    )
    diagram = wandb.plot.line_series(
        [[confidence for confidence, _, _ in model.calibration.bins] for model in models if model.calibration],
        [[accuracy for _, accuracy, _ in model.calibration.bins] for model in models if model.calibration],
        keys=[model.name for model in models],
        title="Calibration on clean images",
        xname="confidence",
    )
    run.log({"noise/curve": noise, "calibration/diagram": diagram})
    others = [[model.name, *row.model_dump().values()] for model in models for row in model.out_of_distribution]
    columns: list[str | int] = ["model", "against", "images", "max_probability", "entropy", "distance_to_center"]
    run.log({"out_of_distribution": wandb.Table(columns=columns, data=others)})
