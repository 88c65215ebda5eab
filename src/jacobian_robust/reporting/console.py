"""What an evaluation prints at its end: verdicts, tables of accuracies."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.certificates import CertifiedTable, certified_table
from jacobian_robust.reporting.figures import NORMS, SYMBOLS, percent, unmet_note
from jacobian_robust.robustness.schema import Budget, Group, Results, Threat
from jacobian_robust.robustness.statistics import wilson_interval

__all__ = ["print_results"]

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_results(results: Results, alike: Sequence[Group], console: Console | None = None) -> None:
    """Print the verdicts and, below them, the tables."""
    console = console or Console()
    for line in _verdicts(results):
        console.print(line, soft_wrap=True)
    for norm in results.norms:
        certified = certified_table(results, norm)
        console.print(_table(results, norm, certified))
        if certified is not None and certified.columns != [
            "under attack",
            "certified",
        ]:  # else all of it is in the first table
            console.print(_certified(certified, norm))
    for group in alike:
        console.print(
            f"{group.name}, {len(group.seeds)} seeds: clean {_spread(*group.clean)}; "
            + "; ".join(
                f"{NORMS[norm]} {eps:g} {_spread(mean, spread)} ({_spread(*share) if share else '–'})"
                for norm in results.norms
                for (eps, mean, spread), share in zip(group.robust[norm], group.of_correct[norm], strict=True)
            ),
            soft_wrap=True,
        )


def _spread(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f} ± {100 * spread:.1f}%"


def _verdicts(results: Results) -> list[Text]:
    """Return a line for each model's verdict, and one for each of its checks that did not pass."""
    lines = []
    for model in results.models:
        if model.verdict is None:
            continue
        found = {status: [c for c in model.checks if c.status == status] for status in ("pass", "warn", "fail", "skip")}
        counts = ", ".join(f"{len(checks)} {status}" for status, checks in found.items() if checks)
        lines.append(Text.assemble(f"{model.name}: sanity ", (model.verdict, _STYLES[model.verdict]), f" ({counts})"))
        lines += [
            Text.assemble("  ", (status, _STYLES[status]), f" {check.name}: {check.why}")
            for status in ("fail", "warn")
            for check in found[status]
        ]
    return lines


def _certified(certified: CertifiedTable, norm: Norm) -> Table:
    table = Table(
        title=f"{NORMS[norm]}, certified beside robust under attack: share of all images",
        caption="\n".join(certified.notes),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model")
    for name in (SYMBOLS[norm], *certified.columns):
        table.add_column(name, justify="right")
    for name, eps, shares in certified.rows:
        table.add_row(name, f"{eps:g}", *map(percent, shares))
    return table


def _table(results: Results, norm: Norm, certified: CertifiedTable | None) -> Table:
    """Return clean accuracy, then accuracy under attack and certified accuracy at each budget, then the cost."""
    attacks = [name for name, attack in results.attacks.items() if attack["norm"] == norm]
    models = results.models
    threats = [next(threat for threat in model.threats if threat.norm == norm) for model in models]
    covered = certified is not None and "certified" in certified.columns
    budgets = "each budget on its own" if results.independent else "an image broken once stays broken"
    table = Table(
        title=f"{NORMS[norm]}, worst case over {', '.join(attacks)} ({budgets}): {results.right} on {models[0].images} "
        f"{results.split} images",
        caption="\n".join(_notes(results, norm, threats, certified if covered else None)),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("clean", justify="right")
    starred = results.unmet(norm)
    for budget in threats[0].budgets:
        star = "*" if budget.eps in starred else ""
        table.add_column(f"{SYMBOLS[norm]} = {results.budget(norm, budget.eps)}{star}", justify="right")
        if covered:
            table.add_column("certified", justify="right")
    costs = [model.plain_step_equivalents for model in models if model.plain_step_equivalents]
    if known := len(costs) == len(models):
        table.add_column("training, plain steps", justify="right")
    for i, (model, threat) in enumerate(zip(models, threats, strict=True)):
        cells = [cell for budget in threat.budgets for cell in _cells(budget, results.independent, covered)]
        if known:
            cells.append(f"{costs[i]:.0f} (×{costs[i] / costs[0]:.2f})" if i else f"{costs[0]:.0f}")
        table.add_row(model.name, f"{model.clean_accuracy:.1%}", *cells)
    return table


def _cells(budget: Budget, independent: bool, covered: bool) -> list[str]:
    of_correct = f" ({percent(budget.share_of_attacked)})" if independent else ""
    return [f"{budget.robust_accuracy:.1%}{of_correct}", *([percent(budget.certified_accuracy)] if covered else [])]


def _notes(results: Results, norm: Norm, threats: Sequence[Threat], certified: CertifiedTable | None) -> list[str]:
    """Return what has to be known to read a table."""
    said = "classified" if results.right == "accuracy" else "predicted"
    notes = [f"* {unmet_note(results, norm)}"] if results.unmet(norm) else []
    if results.independent:
        notes.append(f"In brackets: the note's convention, the share of the correctly {said} images that stay correct.")
    if certified is not None:
        notes.append(certified.notes[0])
    shares = [b.robust_accuracy for threat in threats for b in threat.budgets]
    images = results.models[0].images
    ends = [wilson_interval(share, images) for share in (*shares, *(model.clean_accuracy for model in results.models))]
    widest = max(high - low for low, high in ends) / 2
    return [*notes, f"{images} images tell a share of all images to ± {100 * widest:.1f} points at most (95%)."]
