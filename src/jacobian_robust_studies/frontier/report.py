"""The report of the study: Markdown tables and a picture of all that is known."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.documents import Document
from jacobian_robust_studies.frontier.figures import Point, frontier, pareto
from jacobian_robust_studies.frontier.plan import UNDEFENDED, Method
from jacobian_robust_studies.frontier.record import Record, Row

__all__ = ["missing", "rows_table", "summary_table", "write_report"]


def write_report(record: Record, summary: Document, appendix: Document) -> None:
    """Write the summary and the appendix into their documents, and the picture beside the record."""
    if record.rows():
        kinds = {name: _kind(name, method) for name, method in record.plan.methods.items()}
        figure = frontier(_panels(record), record.plan.published, kinds)
        plots.write_picture(figure, record.directory / record.grid)
        picture = f"\n![Accuracy against robustness, a line for each method](frontier/{record.grid}.png)\n"
        summary.write(f"{summary_table(record)}\n{_state(record)}{picture}")
    appendix.write(f"{rows_table(record)}\n{missing(record)}")


def _kind(name: str, method: Method) -> str:
    """Return in words what a method trains with."""
    bounds = any("certified_margin" in option for option in method.options)
    if method.adversarial:
        return "interval bounds and adversarial examples" if bounds else "adversarial examples"
    return UNDEFENDED if name == UNDEFENDED else "interval bounds" if bounds else "penalty or noise"


def _state(record: Record) -> str:
    """Return in one sentence how much of the grid is made."""
    cells, untested = record.missing()
    known, grid = len(record.rows()), record.plan.grids[record.grid]
    lacking = f"{sum(map(record.cost, cells)):,.0f} plain steps are missing"
    tests = len(grid.methods) * len(grid.lengths)
    made = f"{known} of {known + len(cells)} trainings are made ({lacking})"
    return f"{made}, and {tests - len(untested)} of {tests} tests: [row by row](frontier/{record.grid}.md).\n"


def _finalists(record: Record) -> list[tuple[str, int, list[Row], Results | None]]:
    """Return by method and length the rows of the chosen strength, and their evaluation on test images."""
    known, grid, found = record.rows(), record.plan.grids[record.grid], []
    for length in grid.lengths:
        for method in grid.methods:
            if cells := record.chosen(method, length):
                found.append((method, length, [known[cell] for cell in cells], record.tested(method, length)))
    return found


def summary_table(record: Record) -> str:
    """Return, as Markdown, the chosen strength of each method and length: on validation images, and on test images."""
    finalists = _finalists(record)
    budgets = list(dict.fromkeys(eps for _, _, rows, _ in finalists for eps in rows[0].budgets))
    marks = _on_front(record)
    attacked = list(dict.fromkeys(budget for *_, results in finalists if results for budget in _budgets(results)))
    head = ["%, ± standard error", "strength", "plain epochs", "seeds", "cost, plain steps"]
    head += ["clean", *(f"PGD ℓ∞ {eps:g}" for eps in budgets), f"certified {record.plan.eps:g}"]
    head += [
        "test: clean",
        *(f"AA {plots.NORMS[norm]} {eps:g}" for norm, eps in attacked),
        f"certified {record.plan.eps:g}",
        "verdict",
        "weights",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 4) + " --- | --- |"]
    for method, length, rows, results in finalists:
        cells = [f"**{method}**" if (method, length) in marks else method, _strength(record, rows[0]), str(length)]
        cells += [", ".join(str(row.seed) for row in rows), f"{fmean(row.plain_steps for row in rows):,.0f}"]
        cells += [_share([row.clean for row in rows], rows[0].images)]
        cells += [_share([row.robust_at(eps) for row in rows], rows[0].images) for eps in budgets]
        certified = [row.certified_at(record.plan.eps) for row in rows]
        cells.append(_share([share or 0.0 for share in certified], rows[0].images) if None not in certified else "–")
        cells += _tested(results, attacked, record.plan.eps)
        cells.append(" ".join(f"`{row.sha256[:8]}`" for row in rows))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _budgets(results: Results) -> list[tuple[Norm, float]]:
    return [(threat.norm, budget.eps) for threat in results.models[0].threats for budget in threat.budgets]


def _tested(results: Results | None, budgets: Sequence[tuple[Norm, float]], eps: float) -> list[str]:
    """Return the cells of an evaluation on test images. A failing verdict leaves no figure."""
    if results is None:
        return ["–"] * (len(budgets) + 3)
    verdict = ", ".join(dict.fromkeys(str(model.verdict or "–") for model in results.models))
    if "fail" in verdict:
        return ["–"] * (len(budgets) + 2) + [verdict]
    images, models = results.models[0].images, results.models
    cells = [_share([model.clean_accuracy for model in models], images)]
    cells += [_share([dict(model.accuracy(norm))[budget] for model in models], images) for norm, budget in budgets]
    certified = [dict(model.certified("linf")).get(eps) for model in models]
    cells.append(_share([share or 0.0 for share in certified], images) if None not in certified else "–")
    return [*cells, verdict]


def _strength(record: Record, row: Row) -> str:
    option = record.plan.methods[row.method].strength
    return f"`{option}={row.strength}`" if option else ""


def _share(shares: Sequence[float], images: int) -> str:
    """Return a percentage: the mean of several seeds with its standard error, or one with the binomial's."""
    mean = fmean(shares)
    error = stdev(shares) / sqrt(len(shares)) if len(shares) > 1 else sqrt(mean * (1 - mean) / images)
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def _panels(record: Record) -> dict[str, dict[str, list[Point]]]:
    """Return by panel and method the points to draw: validation at each budget, and AutoAttack where it was run."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in record.rows().values():
        for eps in row.budgets:
            of = panels.setdefault(f"validation, PGD-40, ℓ∞ {eps:g}", {}).setdefault(row.method, [])
            of.append(Point(row.clean, row.robust_at(eps), row.images, row.strength, row.length))
    for method, length, rows, results in _finalists(record):
        for model in results.models if results and all(model.verdict != "fail" for model in results.models) else ():
            for eps, robust in model.accuracy("linf")[1:]:
                of = panels.setdefault(f"test, AutoAttack, ℓ∞ {eps:g}", {}).setdefault(method, [])
                of.append(Point(model.clean_accuracy, robust, model.images, rows[0].strength, length))
    return panels


def _on_front(record: Record) -> set[tuple[str, int]]:
    """Return the methods and lengths whose chosen strength no other is better than in both, on validation images."""
    points = {
        (method, length): (fmean(row.clean for row in rows), fmean(row.robust_at(record.plan.eps) for row in rows))
        for method, length, rows, _ in _finalists(record)
    }
    best = pareto(list(points.values()))
    return {key for key, point in points.items() if point in best}


def rows_table(record: Record) -> str:
    """Return every training as a row of Markdown, by length."""
    known = list(record.rows().values())
    lines = [
        "| method | strength | plain epochs | seed | cost, plain steps | images | clean | PGD | certified | weights |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for row in known:
        shares = ["diverged", "", ""]
        if row.sha256:
            shares = [f"{row.clean:.4g}", row.robust, row.certified]
        cells = [row.method, _strength(record, row), str(row.length), str(row.seed), f"{row.plain_steps:,.0f}"]
        lines.append(f"| {' | '.join([*cells, str(row.images), *shares, f'`{row.sha256[:8]}`'])} |")
    commits = ", ".join(dict.fromkeys(row.commit[:7] + ("*" if row.dirty else "") for row in known if row.commit))
    return "\n".join(lines) + f"\n\nShares of the first validation images; budgets in ℓ∞. Code: {commits or '–'}.\n"


def missing(record: Record) -> str:
    """Return what is missing of the grid, and what it costs in plain steps, by method and length."""
    cells, untested = record.missing()
    if not cells and not untested:
        return "Nothing is missing.\n"
    lines = [
        "Missing, with its cost in plain steps (measured on this grid where a training of the method is known):",
        "",
    ]
    groups: dict[tuple[str, int], float] = {}
    for cell in cells:
        key = cell.method, cell.length
        groups[key] = groups.get(key, 0.0) + record.cost(cell)
    counts = {key: sum((cell.method, cell.length) == key for cell in cells) for key in groups}
    lines += [f"- {m}, {n} plain epochs: {counts[m, n]} trainings, {steps:,.0f}" for (m, n), steps in groups.items()]
    if cells:
        lines.append(f"- together {len(cells)} trainings, {sum(groups.values()):,.0f} plain steps")
    if untested:
        lines.append(f"- on test images: {', '.join(f'{method} ({length})' for method, length in untested)}")
    return "\n".join(lines) + "\n"
