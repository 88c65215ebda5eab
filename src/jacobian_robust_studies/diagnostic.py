"""The note's six simplifications as diagnostics of an evaluation: ``diagnostics=simplifications``."""

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from jinja2 import Environment
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import Classifier
from jacobian_robust.evaluation.diagnostics import Diagnostics
from jacobian_robust.files import write_atomically
from jacobian_robust.options import STRICT, Count
from jacobian_robust.reporting.figures import suffix_of
from jacobian_robust.reporting.html import Section
from jacobian_robust.robustness.prediction import Sample
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.simplifications.figures import six_simplifications
from jacobian_robust_studies.simplifications.measure import PASSES, Study, study
from jacobian_robust_studies.simplifications.report import (
    FALL_COLUMNS,
    FALL_NOTE,
    fall_rows,
    image_rows,
    print_simplifications,
    summary,
)
from jacobian_robust_studies.simplifications.schema import Simplifications, Split

__all__ = ["SimplificationsDiagnostics"]

_CAPTION = "The note's six simplifications; simplifications.json describes every figure."

_SECTION = """<h2>The note's six simplifications</h2>
{% for model in simplifications %}
<h3>{{ model.name }}</h3>
<table>
<tr><th>simplification</th><th class="text">measured on {{ model.images }} images</th></tr>
{% for name, text in model.summary %}
<tr><td>{{ name }}</td><td class="text">{{ text }}</td></tr>
{% endfor %}
</table>
<details>
<summary>What the condition ‖J‖ ≤ d/ε promised, and the falls</summary>
{% for title, rows in model.falls.items() %}
<h3>{{ title }}</h3>
<table>
<tr>{% for column in fall_columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
<p class="note">{{ fall_note }}</p>
</details>
{% endfor %}
"""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SimplificationsDiagnostics(Diagnostics):
    """The note's six simplifications, measured one by one.

    Args:
        images: how many images of the split, and as many training images.
    """

    images: Count = 500

    def measure(
        self, classifier: Classifier, sample: Sample, training: Sample | None, budgets: Sequence[float]
    ) -> Study:
        """Return the six simplifications of one classifier."""
        condition = None
        with contextlib.suppress(UserError):  # a foreign model does not say
            condition = classifier.checkpoint.condition(classifier.datamodule.classes)
        total = PASSES * len(sample.images)
        with tqdm(total=total, desc=f"simplifications of {classifier.name}", unit="image") as bar:
            return study(
                classifier.name,
                classifier.network,
                sample,
                training,
                budgets=budgets,
                condition=condition,
                rows=classifier.checkpoint.rows,
                progress=bar.update,
            )

    def figures(self, measured: Sequence[Study], results: Results) -> Mapping[str, Figure]:
        """Return a figure for each classifier."""
        return {
            f"simplifications{suffix_of(one.result.name, len(measured))}": six_simplifications(
                one.result,
                {place: sample.radii for place, (sample, _) in one.samples.items()},
                split=results.split,
                # Samples of height 1, as the toy model's, are no pictures.
                things="points" if one.samples["evaluated"][0].images.shape[-2] == 1 else "images",
            )
            for one in measured
        }

    def write(self, measured: Sequence[Study], results: Results, directory: Path) -> None:
        """Write ``simplifications.csv`` and ``simplifications.json``."""
        with write_atomically(directory / "simplifications.csv") as file:
            csv.writer(file).writerows(image_rows(measured))
        with write_atomically(directory / "simplifications.json") as file:
            file.write(_simplifications(measured, results).model_dump_json(indent=2))

    def section(self, measured: Sequence[Study], results: Results) -> Section:
        """Return the section of the report."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        models = [
            {
                "name": model.name,
                "images": model.images,
                "summary": summary(model),
                "falls": {
                    f"{falls[0].images} correct images, {split}": fall_rows(falls)
                    for split in get_args(Split)
                    if (falls := model.falls_of(split))
                },
            }
            for model in _simplifications(measured, results).models
        ]
        html = environment.from_string(_SECTION).render(
            simplifications=models, fall_columns=FALL_COLUMNS, fall_note=FALL_NOTE
        )
        return Section(html, {"simplifications": _CAPTION})

    def print(self, measured: Sequence[Study], results: Results) -> None:
        """Print the six simplifications and, below them, what accounts for each fall."""
        print_simplifications(_simplifications(measured, results))


def _simplifications(measured: Sequence[Study], results: Results) -> Simplifications:
    """Return what ``simplifications.json`` holds."""
    return Simplifications(
        split=results.split,
        seed=results.seed,
        attacks=[name for name, attack in results.attacks.items() if attack["norm"] == "l2"],
        models=[one.result for one in measured],
    )
