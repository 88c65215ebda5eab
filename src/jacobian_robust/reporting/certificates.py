"""The tables of certificates: accuracy under attack beside certified accuracy, budget by budget."""

from dataclasses import dataclass

from jacobian_robust.attacks import Norm
from jacobian_robust.robustness.schema import Results

__all__ = ["CertifiedTable", "certified_table"]


@dataclass(frozen=True)
class CertifiedTable:
    """Certified accuracy beside accuracy under attack, in one norm.

    Attributes:
        columns: names of the columns after those of the model and the budget.
        rows: the model, the budget, and the shares of all images; ``None`` where a certificate was not asked for.
        notes: a sentence for each kind of certificate.
    """

    columns: list[str]
    rows: list[tuple[str, float, list[float | None]]]
    notes: list[str]


def certified_table(results: Results, norm: Norm) -> CertifiedTable | None:
    """Return the table of a norm; ``None`` where nothing was certified in it."""
    smoothed = {c.certificate: c.smoothed for model in results.models for c in model.certificates if c.norm == norm}
    if not smoothed:
        return None
    of_network = [name for name, of_smoothed in smoothed.items() if not of_smoothed]
    apart = [*(of_network if len(of_network) > 1 else []), *(name for name in smoothed if smoothed[name])]
    labels = [f"{name} (smoothed classifier)" if smoothed[name] else name for name in apart]
    columns = ["under attack", *(["certified"] if of_network else []), *labels]
    rows = [
        (
            model.name,
            budget.eps,
            [
                budget.robust_accuracy,
                *([budget.certified_accuracy] if of_network else []),
                *(model.certified_share(name, norm, budget.eps) for name in apart),
            ],
        )
        for model in results.models
        for threat in model.threats
        if threat.norm == norm
        for budget in threat.budgets
    ]
    return CertifiedTable(columns, rows, _notes(results, smoothed, of_network))


def _notes(results: Results, smoothed: dict[str, bool], of_network: list[str]) -> list[str]:
    notes = []
    if of_network:
        classes = results.right == "accuracy"
        of = "share of all images that are classified correctly" if classes else f"{results.right} on all images"
        notes.append(f"certified: {of} and that no change within ε can alter, by {' or '.join(of_network)}.")
    for name in (name for name in smoothed if smoothed[name]):
        options = results.certificates.get(name, {})
        noise = f"σ = {options.get('sigma', 0):g}, confidence {options.get('confidence', 0):g} for each image alone"
        notes.append(
            f"{name} certifies the smoothed classifier (Gaussian noise of {noise}), not the network that is attacked: "
            "it may exceed the accuracy under attack."
        )
    return notes
