"""The protocol of further measurements at each classifier, which an evaluation composes from a config."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from jacobian_robust.reporting.html import Section
from jacobian_robust.robustness.prediction import Sample
from jacobian_robust.robustness.schema import Results

if TYPE_CHECKING:
    from jacobian_robust.evaluation.classifiers import Classifier

__all__ = ["Diagnostics"]


class Diagnostics(abc.ABC):
    """Measurements at images whose geometry and nearest adversarial examples are known; one class, one YAML file.

    Attributes:
        images: how many images of the split are asked for, and as many training images.
    """

    images: int

    @abc.abstractmethod
    def measure(
        self, classifier: "Classifier", sample: Sample, training: Sample | None, budgets: Sequence[float]
    ) -> Any:
        """Return what is measured at one classifier.

        Args:
            classifier: the classifier.
            sample: the evaluated images.
            training: images that it was trained on, where they are known.
            budgets: the ℓ2 radii that are looked at.
        """

    @abc.abstractmethod
    def figures(self, measured: Sequence[Any], results: Results) -> Mapping[str, Figure]:
        """Return figures of what was measured at all classifiers, by name."""

    @abc.abstractmethod
    def write(self, measured: Sequence[Any], results: Results, directory: Path) -> None:
        """Write the files of what was measured."""

    @abc.abstractmethod
    def section(self, measured: Sequence[Any], results: Results) -> Section:
        """Return the section of the report."""

    @abc.abstractmethod
    def print(self, measured: Sequence[Any], results: Results) -> None:
        """Print what was measured."""
