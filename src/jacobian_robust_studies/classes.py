"""Which class pays for the note's penalty: ``python -m jacobian_robust_studies.classes``.

The stereographic chart projects from the vertex of the last class. There its conformal factor ``ρ`` tends to zero, and
the exponent of eq. 15, ``(‖J_μ‖ − δ/ε)/ρ``, is largest for confident predictions of that class. This trains one small
network with each chart, and with another class last, and counts the digits of each class that it gets right. The note's
published networks are looked at likewise. Run again, it makes only what is missing.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust.files import write_atomically
from jacobian_robust.models import ConvSmall
from jacobian_robust.penalties import Frobenius
from jacobian_robust.provenance import git_state
from jacobian_robust.reporting.figures import PALETTE, in_words, write_picture
from jacobian_robust.robustness.schema import ClassAccuracy, Results
from jacobian_robust_studies.documents import Document

CLASSES = 10
PUBLISHED = ("note_vanilla", "note_regularized")
PENALTY_IMAGES = 1000
"""Of so many test images the published networks' mean penalty is; what they get right is of all."""
COMMAND = "python -m jacobian_robust_studies.classes"


@dataclass(frozen=True)
class Case:
    """What a network is trained with.

    Attributes:
        label: what the table calls it.
        chart: where the penalty measures the Jacobian; ``None`` for no penalty.
        last: the class whose vertex the stereographic chart projects from.
    """

    label: str
    chart: Literal["stereographic", "sphere"] | None
    last: int = CLASSES - 1


CASES = (
    Case("no penalty", None),
    Case("stereographic, class 9 last (the note)", "stereographic"),
    Case("stereographic, class 4 last", "stereographic", last=4),
    Case("sphere", "sphere"),
)


@dataclass(frozen=True)
class Row:
    """A trained network, by class.

    Attributes:
        case: what it was trained with.
        seed: of its weights and of the order of the images.
        recall: share of the test images of each class that are classified correctly.
        penalty: the mean of eq. 15 in the stereographic chart of the case over the test images of each class.
        epochs: of its training.
        eta: weight of the penalty.
        commit: of the code that made it.
        dirty: whether files differed from it.
    """

    case: str
    seed: int
    recall: list[float]
    penalty: list[float]
    epochs: int = 6
    eta: float = 0.006
    commit: str | None = None
    dirty: bool | None = None


def train(case: Case, images: Tensor, labels: Tensor, *, seed: int, epochs: int, eta: float) -> nn.Module:
    """Return a small strided network trained on ``(1 − η)·CE + η·α``, all else equal for all cases."""
    torch.manual_seed(seed)
    model = ConvSmall(first=16, second=32, hidden=128)
    order = _order(case.last)
    penalty = None if case.chart is None else Frobenius(probes=1, delta_over_eps=1e-3, chart=case.chart)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc=case.label, unit="epoch"):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            inputs = images[batch].requires_grad_(penalty is not None)
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits, labels[batch])
            if penalty is not None:
                alpha = penalty(logits[:, order], inputs, generator=generator).mean()
                loss = (1 - eta) * loss + eta * alpha
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _order(last: int) -> list[int]:
    """Return the classes with one of them moved to the end."""
    return [label for label in range(CLASSES) if label != last] + [last]


def measure(model: nn.Module, case: Case, images: Tensor, labels: Tensor, *, seed: int) -> Row:
    """Return the recall and the mean penalty of each class on some images."""
    right, values = [], []
    alpha = Frobenius(delta_over_eps=1e-3)
    for batch in torch.arange(len(images)).split(500):
        inputs = images[batch].requires_grad_()
        logits = model(inputs)
        right.append(logits.argmax(-1) == labels[batch])
        values.append(alpha(logits[:, _order(case.last)], inputs, create_graph=False).detach())
    hits, penalties = torch.cat(right).double(), torch.cat(values).double()
    of = [labels == label for label in range(CLASSES)]
    return Row(case.label, seed, [hits[c].mean().item() for c in of], [penalties[c].mean().item() for c in of])


def published(name: str, results: Path, images: Tensor, labels: Tensor) -> Row:
    """Return what a published network's evaluation says of each class, and its mean penalty on the first images."""
    model = load_checkpoint(results / f"checkpoints/{name}.safetensors").model().eval()
    row = measure(model, Case(name, "stereographic"), images[:PENALTY_IMAGES], labels[:PENALTY_IMAGES], seed=0)
    return replace(row, recall=[found.clean_correct / found.images for found in _classes(name, results)])


def _classes(name: str, results: Path) -> list[ClassAccuracy]:
    return Results.model_validate_json((results / f"note/{name}.json").read_bytes()).models[0].classes


def trained_table(rows: Sequence[Row]) -> str:
    """Return the recall of each class as Markdown, a row for each case: the mean over the seeds."""
    if not rows:
        return "No training of this command has ended yet.\n"
    lines = [
        "| test images right, % | seeds | " + " | ".join(map(str, range(CLASSES))) + " |",
        "| --- | --- |" + " ---: |" * CLASSES,
    ]
    for label, recall, _ in _means(rows):
        seeds = ", ".join(str(row.seed) for row in rows if row.case == label)
        lines.append(f"| {label} | {seeds} | " + " | ".join(f"{100 * share:.1f}" for share in recall) + " |")
    return "\n".join(lines) + "\n"


def published_table(rows: Sequence[Row], results: Path) -> str:
    """Return what the note's published networks do with each class: right clean, robust, and the mean penalty."""
    lines = [
        "| | network | " + " | ".join(map(str, range(CLASSES))) + " |",
        "| --- | --- |" + " ---: |" * CLASSES,
    ]
    cells: dict[str, list[tuple[str, list[str]]]] = {}
    for row in rows:
        classes = _classes(row.case, results)
        cells.setdefault("test images", [("", [str(c.images) for c in classes])])
        cells.setdefault("right clean", []).append((row.case, [str(c.clean_correct) for c in classes]))
        robust = [str(c.robust_correct["linf"][0]) for c in classes]
        cells.setdefault("right under PGD-40, ℓ∞ 0.1", []).append((row.case, robust))
        cells.setdefault(f"mean penalty α, {PENALTY_IMAGES:,} images", []).append(
            (row.case, [f"{value:.3g}" for value in row.penalty])
        )
    for what, of in cells.items():
        lines += [f"| {what} | {name} | {' | '.join(values)} |" for name, values in of]
    return "\n".join(lines) + "\n"


def _means(rows: Sequence[Row]) -> list[tuple[str, list[float], list[float]]]:
    """Return for each case its label, the recall and the penalty of each class, as means over the seeds."""
    means = []
    for label in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == label]
        recall = torch.tensor([row.recall for row in mine]).mean(0).tolist()
        penalty = torch.tensor([row.penalty for row in mine]).mean(0).tolist()
        means.append((label, recall, penalty))
    return means


def figure(published: Sequence[Row], trained: Sequence[Row]) -> Figure:
    """Return the errors and the mean penalty of each class, a line for each network or case.

    Bars are the standard deviation over the seeds, where there are several.
    """
    shown = [rows for rows in (published, trained) if rows]
    drawn = Figure(figsize=(9, 4 * len(shown)), layout="constrained")
    for axes, rows in zip(drawn.subplots(len(shown), 2, squeeze=False), shown, strict=True):
        errors, penalties = axes
        means = _means(rows)
        for i, (label, recall, penalty) in enumerate(means):
            style = {"marker": "osD^"[i], "color": PALETTE[(6, 1, 4, 0)[i]], "label": in_words([label])[0]}
            seeds = torch.tensor([row.recall for row in rows if row.case == label])
            spread = 100 * seeds.std(0) if len(seeds) > 1 else torch.zeros(CLASSES)
            errors.errorbar(range(CLASSES), [100 * (1 - share) for share in recall], spread, capsize=3, **style)
            penalties.plot(range(CLASSES), penalty, **style)
        errors.set(xlabel="class", ylabel="test images wrong, %", xticks=range(CLASSES), ylim=(0, None))
        penalties.set(xlabel="class", ylabel="mean penalty α (eq. 15)", xticks=range(CLASSES), yscale="log")
        penalties.yaxis.set_minor_locator(NullLocator())
        errors.set_title("\n")  # room for the legend, which is wider than a panel
        errors.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, frameon=False).set_in_layout(False)
        errors.grid(alpha=0.3)
        penalties.grid(alpha=0.3)
    return drawn


class Record:
    """What is known, in ``note/classes.json`` of a directory, and the document and the figure drawn from it."""

    def __init__(self, results: Path) -> None:
        self.results, self.path = results, results / "note/classes.json"
        self.document = Document(results / "classes.md", COMMAND, "Which class pays for the note's penalty")

    def rows(self) -> list[Row]:
        """Return the networks that were measured.

        Raises:
            UserError: if the file is not of this study.
        """
        if not self.path.is_file():
            return []
        try:
            return TypeAdapter(list[Row]).validate_python(json.loads(self.path.read_text())["rows"])
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not what this command writes: move it away") from error

    def add(self, row: Row, code: dict[str, Any]) -> None:
        """Add a network, measured with some code, and write everything anew."""
        rows = [*self.rows(), replace(row, commit=code["commit"], dirty=code["dirty"])]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as file:
            json.dump({"rows": [asdict(row) for row in rows]}, file, indent=1)
        self.write()

    def write(self) -> None:
        """Write the document and the figure."""
        published = [row for row in self.rows() if row.case in PUBLISHED]
        trained = [row for row in self.rows() if row.case not in PUBLISHED]
        tables = f"{published_table(published, self.results)}\n{trained_table(trained)}"
        self.document.write(f"{tables}\n![Errors and penalty by class](note/classes.png)\n")
        write_picture(figure(published, trained), self.path)


@ends_in_one_line()
def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="%(default)s; none: the published ones")
    parser.add_argument("--epochs", type=int, default=6, help="of each training (%(default)s)")
    parser.add_argument(
        "--eta", type=float, default=0.006, help="weight η of the penalty (%(default)s, the note's last)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory with note.md (%(default)s)")
    options = parser.parse_args()
    code = git_state()  # of what is about to run, not of what is there in the end
    record = Record(options.out)
    data = MNISTDataModule(batch_size=128, validation_size=0)
    data.prepare_data()
    data.setup()
    train_set, test_set = (data.split(name).first(None) for name in ("train", "test"))
    known = {(row.case, row.seed, row.epochs, row.eta) for row in record.rows()}
    for name in PUBLISHED:
        if name not in {case for case, *_ in known}:
            record.add(published(name, options.out, *test_set), code)
    for seed in options.seeds:
        for case in CASES:
            if (case.label, seed, options.epochs, options.eta) not in known:
                model = train(case, *train_set, seed=seed, epochs=options.epochs, eta=options.eta)
                row = measure(model, case, *test_set, seed=seed)
                record.add(replace(row, epochs=options.epochs, eta=options.eta), code)
    record.write()


if __name__ == "__main__":
    main()
