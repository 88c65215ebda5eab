"""What a report says first: one sentence and one table."""

from dataclasses import dataclass

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.figures import NORMS, SYMBOLS, in_words, percent
from jacobian_robust.robustness.schema import Budget, Model, Results

__all__ = ["Summary", "summarised"]


@dataclass(frozen=True)
class Summary:
    """The head of a report.

    Attributes:
        sentence: what was found, in words.
        norm: of the budget that it is about.
        columns: of the table, after the model and its verdict.
        rows: the model, what it is called in figures, its verdict, and the cells.
    """

    sentence: str
    norm: Norm
    columns: list[str]
    rows: list[tuple[str, str, str | None, list[str]]]


def summarised(results: Results) -> Summary:
    """Return the head of a report: all models at one budget of the first norm.

    It is the largest at which some model is right on half of the images, or the smallest if there is none.
    """
    norm = results.norms[0]
    budgets = [next(t for t in model.threats if t.norm == norm).budgets for model in results.models]
    at = max((i for met in budgets for i, budget in enumerate(met) if budget.robust_accuracy >= 0.5), default=0)
    found = [(model, met[at]) for model, met in zip(results.models, budgets, strict=True)]
    eps = f"{NORMS[norm]} {SYMBOLS[norm]} = {results.budget(norm, found[0][1].eps)}"
    certified = any(budget.certified_accuracy is not None for _, budget in found)
    costs = [model.plain_step_equivalents for model in results.models]
    columns = ["clean", f"under attack within {eps}", *([f"certified at {eps}"] if certified else [])]
    columns += ["training cost"] if any(costs) else []
    rows: list[tuple[str, str, str | None, list[str]]] = []
    for (model, budget), called in zip(found, in_words([model.name for model in results.models]), strict=True):
        cells = [percent(model.clean_accuracy), percent(budget.robust_accuracy)]
        cells += [percent(budget.certified_accuracy)] if certified else []
        cells += [_cost(model, results.models[0])] if any(costs) else []
        rows.append((model.name, called, model.verdict, cells))
    return Summary(_sentence(results, found, eps), norm, columns, rows)


def _sentence(results: Results, found: list[tuple[Model, Budget]], eps: str) -> str:
    best, budget = max(found, key=lambda pair: pair[1].robust_accuracy)
    of = f"{best.images:,} {results.split} images"
    if len(found) == 1:
        said = (
            f"{best.name} is right on {percent(best.clean_accuracy)} of {of}, and under every attack within {eps} on "
            f"{percent(budget.robust_accuracy)}"
        )
    else:
        first, of_first = found[0]
        said = (
            f"Under every attack within {eps}, {best.name} is right on {percent(budget.robust_accuracy)} of {of}, "
            f"the most of {len(found)} models"
        )
        if first is not best:
            said += f"; {first.name} is on {percent(of_first.robust_accuracy)}"
    covered = [(b.certified_accuracy, model.name) for model, b in found if b.certified_accuracy is not None]
    if covered:
        share, name = max(covered, key=lambda pair: pair[0])
        said += f"; {name} is certified there on {percent(share)}"
    return f"{said}."


def _cost(model: Model, first: Model) -> str:
    """Return the cost of a training over that of the first model's, or else in plain steps."""
    if not model.plain_step_equivalents:
        return "–"
    if first.plain_step_equivalents:
        return f"×{model.plain_step_equivalents / first.plain_step_equivalents:.2f}"
    return f"{model.plain_step_equivalents:.0f} plain steps"
