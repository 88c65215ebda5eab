"""The report of the study: Markdown tables and figures of all that is known."""

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Model, Results
from jacobian_robust_studies.defences.figures import methods_under_attack, trials_by_method
from jacobian_robust_studies.defences.plan import Plan, Trial, choice
from jacobian_robust_studies.defences.record import Evaluations, Record
from jacobian_robust_studies.documents import Document

__all__ = ["protocol", "table", "tuned", "write_report"]

NOISE = 0.3
"""Standard deviation of the Gaussian noise that the table shows, of those that an evaluation measures."""


def write_report(record: Record, document: Document) -> None:
    """Write the tables of all that is known into the document, and the figures beside the record."""
    plan, trials = record.plan, record.trials()
    evaluated = {kind: record.evaluations(kind) for kind in plan.evaluations}
    text = f"{protocol(plan)}\n{tuned(plan, trials, set().union(*evaluated.values()))}"
    if any(trial.finished for found in trials.values() for trial in found):
        plots.save({"trade_off": trials_by_method(trials, robust=plan.objective)}, record.directory)
        text += "\n![Clean against robust accuracy of all trials](defences/trade_off.png)\n"
    for kind, found in evaluated.items():
        if found:
            text += f"\n{table(plan, found)}"
            if len(_budgets(found)) > 1:
                plots.save({kind: methods_under_attack(_accuracy(plan, found))}, record.directory)
                text += f"\n![Accuracy of all methods, clean and within each budget](defences/{kind}.png)\n"
    document.write(text)


def _budgets(evaluations: Evaluations) -> list[tuple[Norm, float]]:
    results, _ = next(iter(evaluations.values()))
    return [(threat.norm, budget.eps) for threat in results.models[0].threats for budget in threat.budgets]


def _name(norm: Norm, eps: float) -> str:
    return f"{plots.NORMS[norm]} {eps:g}"


def _robust(model: Model, budgets: Sequence[tuple[Norm, float]]) -> list[float]:
    return [dict(model.accuracy(norm))[eps] for norm, eps in budgets]


def _accuracy(plan: Plan, evaluations: Evaluations) -> dict[str, dict[str, dict[str, float]]]:
    """Return by panel and method the mean accuracy over the seeds, clean and within each budget."""
    budgets = _budgets(evaluations)
    columns = ["clean", *(_name(*budget) for budget in budgets)]
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, (results, _) in evaluations.items():
        title = f"{'with' if plan.methods[name].adversarial else 'without'} adversarial examples in training"
        rows = [[model.clean_accuracy, *_robust(model, budgets)] for model in results.models]
        panels.setdefault(title, {})[name] = dict(zip(columns, map(fmean, zip(*rows, strict=True)), strict=True))
    return panels


def protocol(plan: Plan) -> str:
    """Return, as Markdown, what all methods have in common, and how they are chosen."""
    return (
        f"All are trained with `{' '.join(plan.options)}`. Cost is the time of a training step in plain steps, and the "
        f"training of all costs the same, as much as {plan.epochs} epochs of {plan.batches} plain steps: a method of "
        "cost c has one c-th of the steps. The exceptions say so.\n\n"
        f"**Choice.** Each method has {plan.trials} trials, of {plan.trial_epochs} such epochs and seed 100, on "
        f"held-out training images: *clean* is the accuracy on all of these, *robust* `{plan.objective}` of "
        f"`{' '.join(plan.tuning)}`. The most robust of those that are right on {plan.clean:.0%} is trained anew, "
        "for longer; if none is so accurate, the most accurate. Finalists have the seeds "
        f"{', '.join(map(str, plan.seeds))}, the others the first alone.\n"
    )


def tuned(plan: Plan, trials: Mapping[str, Sequence[Trial]], made: Collection[str]) -> str:
    """Return, as Markdown, all trials of each method, the chosen one in bold; variations only if they were ``made``."""
    lines = ["| | cost | steps | trials: clean / robust, % |", "| --- | --- | --- | --- |"]
    for name, method in plan.methods.items():
        chosen = choice(plan, name, trials)
        if method.as_tuned is not None:
            cells = [f"as {method.as_tuned}: `{' '.join(chosen.overrides)}`"] if chosen and name in made else []
        else:
            cells = [_tried(trial, chosen=trial is chosen) for trial in trials.get(name, [])]
            if chosen and chosen.clean < plan.clean:
                cells[-1] += f" (chosen by accuracy: none is right on {plan.clean:.0%})"
        if cells:
            steps = plan.epochs_of(name) * plan.steps_of(name)
            lines.append(f"| {name} | {method.cost:.2f} | {steps} | {' · '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tried(trial: Trial, *, chosen: bool) -> str:
    result = f"{100 * trial.clean:.1f} / {100 * trial.robust:.1f}" if trial.finished else "failed"
    return f"`{' '.join(trial.overrides)}` " + (f"**{result}**" if chosen else result)


def table(plan: Plan, evaluations: Evaluations) -> str:
    """Return an evaluation of all methods as Markdown: percentages, mean and standard deviation over the seeds."""
    first, _ = next(iter(evaluations.values()))
    images, reliability = first.models[0].images, first.models[0].calibration is not None
    judged = any(model.verdict for results, _ in evaluations.values() for model in results.models)
    budgets = _budgets(evaluations)
    head = ["%", "adversarial examples", "seeds", "clean", *(_name(*budget) for budget in budgets)]
    head += [f"noise σ {NOISE:g}", "ECE"] * reliability + ["sanity"] * judged
    lines = [
        f"Of the first {images} test images, those that stand under all of {', '.join(first.attacks)} (a share of so "
        f"many has a standard error of up to {50 / images**0.5:.1f} points):",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for name, (results, failed) in evaluations.items():
        method, seeds = plan.methods[name], str(len(results.models))
        label = name if method.budget == 1 else f"{name} ({method.budget:g} times the cost)"
        cells = [label, "yes" if method.adversarial else "no", f"{seeds}, {failed} failed" if failed else seeds]
        cells += _shares(results, budgets)
        if judged:
            cells.append(", ".join(dict.fromkeys(model.verdict or "–" for model in results.models)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shares(results: Results, budgets: Sequence[tuple[Norm, float]]) -> list[str]:
    """Return the cells of a method's row: clean, each budget, noise and calibration."""
    rows: list[list[float | None]] = []
    for model in results.models:
        noisy = [point.accuracy for point in model.noise if point.sigma == NOISE]
        calibration = [model.calibration.ece] if model.calibration else []
        rows.append([model.clean_accuracy, *_robust(model, budgets), *noisy, *calibration])
    return ["–" if None in column else _spread([100 * (v or 0) for v in column]) for column in zip(*rows, strict=True)]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
