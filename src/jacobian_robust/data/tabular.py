"""Tables of measurements, not pictures: those that scikit-learn brings, which need no download."""

from typing import Any, Literal

import torch
from pydantic import Field, validate_call
from torch import Tensor

from jacobian_robust.data.base import ImageDataModule, ImageDataset
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Categorical, Family, Gaussian, GaussianMeanScale
from jacobian_robust.options import STRICT, Count, Seed, Size

__all__ = ["TabularDataModule"]

Table = Literal["diabetes", "breast_cancer", "wine", "digits"]

_SIZES: dict[Table, tuple[int, int]] = {
    "diabetes": (10, 1),
    "breast_cancer": (30, 2),
    "wine": (13, 3),
    "digits": (64, 10),
}
"""Columns, and classes; of one that is a number to be predicted, 1."""

BOX = 5.0
"""What the box of the inputs reaches from the mean of each column, in its standard deviations."""


class TabularDataModule(ImageDataModule):
    """A table of scikit-learn, a row an "image" of one row of pixels.

    Inputs are in [0, 1], as those of all data here: ``1/2 + z/10`` of the standardised column ``z``, by the mean and
    the standard deviation of the training rows (the held-out ones included). So **a budget ε of 0.1 is one standard
    deviation** of every column, and the box reaches five of them either way; the few values beyond are put on its
    edge. A model undoes the scaling itself, as ``model=mlp`` does but for a factor. The number that ``diabetes`` asks
    for is standardised, too: tolerance and σ of ``task=regression`` are in standard deviations of the target.

    Args:
        table: ``diabetes`` (regression, 442 rows), ``breast_cancer`` (569 rows, 2 classes), ``wine`` (178, 3) or
            ``digits`` (1,797 pictures of 8×8 pixels, 10).
        inputs: columns of the table, for ``model.inputs``, which follows.
        outputs: of the model, which follows: the classes; 1 number, or with a σ of its own 2.
        test_share: the part of the rows that is tested on, drawn by ``data_seed``.
        data_seed: of the choice of the test rows.
        batch_size: rows in a training batch.
        validation_size: number of training rows held out for validation.
        split_seed: seed of the choice of the held-out rows.
        validate_on_test: with ``validation_size=0``, use the test rows for the per-epoch curves.
        shuffle_seed: seed of the order of the training rows.

    Raises:
        UserError: if inputs or outputs are not the table's; from :meth:`prepare_data` if scikit-learn is not installed.
    """

    pictures = False

    @validate_call(config=STRICT)
    def __init__(
        self,
        table: Table = "diabetes",
        inputs: Count = 10,
        outputs: Count = 1,
        test_share: float = Field(0.2, gt=0, lt=1),
        data_seed: Seed = 0,
        batch_size: Count = 32,
        validation_size: Size = 50,
        split_seed: Seed = 0,
        validate_on_test: bool = False,
        shuffle_seed: Seed = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            validation_size=validation_size,
            split_seed=split_seed,
            validate_on_test=validate_on_test,
            shuffle_seed=shuffle_seed,
        )
        self.table: Table = table
        self.test_share, self.data_seed, self.outputs = test_share, data_seed, outputs
        columns, self.classes = _SIZES[table]
        if inputs != columns:
            raise UserError(f"data.inputs={inputs}: {table} has {columns} columns; give data.inputs={columns}")
        self.image_shape = (1, 1, columns)

    @property
    def data_name(self) -> str:
        """The table's name, with the unit of a budget."""
        return f"{self.table} (ε 0.1 is one standard deviation)"

    @property
    def output_shape(self) -> tuple[int, ...]:
        """A logit for each class, or one number, or a mean and a log σ."""
        return (self.outputs,)

    def for_task(self, family: Family) -> None:
        """Refuse a task that the table has no targets for."""
        numbers = self.classes == 1
        if not isinstance(family, Gaussian | GaussianMeanScale if numbers else Categorical):
            task = "task=regression or task=regression_scale" if numbers else "task=classification"
            raise UserError(f"task: {self.table} has no targets for {type(family).__name__}; give {task}")
        wanted = 2 if isinstance(family, GaussianMeanScale) else self.classes
        if self.outputs != wanted:
            raise UserError(f"data.outputs={self.outputs}: the task has {wanted} a row; give data.outputs={wanted}")
        self.family = family

    def prepare_data(self) -> None:
        """Raise a UserError if scikit-learn is not installed."""
        self._rows()

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Return the columns and the targets of all rows, in float64."""
        try:
            from sklearn import datasets  # an extra
        except ImportError as error:
            raise UserError("data=tabular needs scikit-learn: pip install jacobian-robust[tabular]") from error
        options: dict[str, Any] = {"scaled": False} if self.table == "diabetes" else {}
        columns, targets = getattr(datasets, f"load_{self.table}")(return_X_y=True, **options)
        return torch.as_tensor(columns).double(), torch.as_tensor(targets).double()

    def _read(self, *, train: bool) -> ImageDataset:
        columns, targets = self._rows()
        order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(self.data_seed))
        tested = max(1, round(self.test_share * len(columns)))
        test, training = order[:tested], order[tested:]
        rows = training if train else test
        pixels = (0.5 + _standardised(columns, training)[rows] / (2 * BOX)).clamp(0, 1)
        images = pixels.float().view(-1, *self.image_shape)
        if self.classes == 1:
            return ImageDataset(images, _standardised(targets[:, None], training)[rows].float())
        return ImageDataset(images, targets[rows].long())


def _standardised(columns: Tensor, training: Tensor) -> Tensor:
    """Return columns less their mean over the training rows, in standard deviations there; a constant one is 0."""
    mean, deviation = columns[training].mean(0), columns[training].std(0)
    return (columns - mean) / torch.where(deviation > 0, deviation, 1.0)
