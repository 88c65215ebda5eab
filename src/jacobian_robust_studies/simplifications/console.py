"""The tables of the six simplifications in a terminal."""

from rich.console import Console
from rich.table import Table

from jacobian_robust_studies.simplifications.report import FALL_COLUMNS, fall_rows, summary
from jacobian_robust_studies.simplifications.schema import Simplifications

__all__ = ["print_simplifications"]


def print_simplifications(simplified: Simplifications) -> None:
    """Print the six simplifications and, below them, what accounts for each fall."""
    console = Console()
    for model in simplified.models:
        title = f"{model.name}: the note's six simplifications on {model.images} {simplified.split} images"
        measured = Table("simplification", "measured", title=title, title_justify="left")
        for row in summary(model):
            measured.add_row(*row)
        console.print(measured)
        table = Table(
            title=f"{model.name}: what the condition ‖J‖ ≤ d/ε promised, and what fell, of the correct images",
            caption="Fell by 1: δ instead of d_B; by 2: the metric is not flat; "
            "the others were promised nothing (5, 6).",
            title_justify="left",
            caption_justify="left",
        )
        for column in FALL_COLUMNS:
            table.add_column(column, justify="right")
        for cells in fall_rows(model.falls_of("evaluated")):
            table.add_row(*cells)
        console.print(table)
