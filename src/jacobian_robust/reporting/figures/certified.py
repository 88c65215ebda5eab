"""Certified accuracy against the budget, beside accuracy under attack."""

from matplotlib.figure import Figure

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.figures.style import BUDGET_LABELS, in_words, line_style, write_note
from jacobian_robust.robustness.schema import Model, Results

__all__ = ["certified_curves"]


def certified_curves(results: Results, *, norm: Norm, note: str = "") -> Figure | None:
    """Return accuracy under attack and certified accuracy against the budget, with what lies between them shaded.

    The robust accuracy of a network is known to lie in the shaded area. A certificate of a smoothed classifier is a
    dotted line: it bounds nothing of the network. A network of which nothing is
    certified has no certified line. ``None`` where no certificate was asked for in the norm.

    Args:
        results: the evaluation.
        norm: of the budgets.
        note: below the axes.
    """
    models = [model for model in results.models if any(c.norm == norm for c in model.certificates)]
    if not models:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    names = in_words([model.name for model in models])
    for i, (model, called) in enumerate(zip(models, names, strict=True)):
        style = line_style(i)
        attacked = model.accuracy(norm)
        certified = model.certified(norm)
        # Between 0 and the first budget a line would say what nobody computed: that the share falls evenly.
        nothing = bool(certified) and not any(share for eps, share in certified if eps)
        said = "under attack (none certified)" if nothing else "under attack"
        axes.plot(*zip(*attacked, strict=True), **style, label=f"{called}: {said}")
        if certified and not nothing:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
            axes.plot(*zip(*certified, strict=True), **style, label=f"{called}: certified")
            eps, upper = zip(*attacked, strict=True)
            axes.fill_between(eps, [dict(certified)[x] for x in eps], upper, color=style["color"], alpha=0.15, lw=0)
        for name, points in _smoothed(model, norm).items():
            style |= {"linestyle": ":", "marker": "x"}
            axes.plot(*zip(*points, strict=True), **style, label=f"{called}: {name}, of the smoothed classifier")
    axes.set(
        xlabel=BUDGET_LABELS[norm],
        ylabel=f"{results.right} on all images",
        ylim=(-0.02, 1.02),
        title=f"Certified and under attack, {models[0].images:,} {results.split} images",
    )
    write_note(figure, note)
    axes.grid(alpha=0.3)
    figure.set_figheight(figure.get_figheight() + 0.2 * len(axes.lines))
    figure.legend(loc="outside upper center", fontsize="small")  # the shaded area fills the axes
    return figure


def _smoothed(model: Model, norm: Norm) -> dict[str, list[tuple[float, float]]]:
    return {
        c.certificate: sorted(
            {0.0: c.correct / model.images, **{b.eps: b.certified_accuracy for b in c.budgets}}.items()
        )
        for c in model.certificates
        if c.smoothed and c.norm == norm
    }
