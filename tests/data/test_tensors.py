import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jacobian_robust.data import TensorsDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import (
    CATEGORICAL,
    BernoulliProduct,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 5), dtype=np.uint8)
LABELS = np.arange(20) % 4


def read(path, family=CATEGORICAL, **options):
    datamodule = TensorsDataModule(file=str(path), **options)
    datamodule.for_task(family)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def save(path, **arrays):
    save_file(arrays, path) if path.suffix == ".safetensors" else np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_split_file_is_read_as_it_is(suffix, tmp_path):
    arrays = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES[:6], "test_labels": LABELS[:6]}
    datamodule = read(save(tmp_path / f"mine{suffix}", **arrays), validation_size=5)
    assert (datamodule.classes, datamodule.image_shape) == (4, (3, 4, 5))
    assert [len(datamodule.split(name)) for name in ("train", "validation", "test")] == [15, 5, 6]
    assert torch.equal(datamodule.split("test").images, torch.from_numpy(IMAGES[:6]))
    assert datamodule.data_name.startswith("mine (")


def test_one_set_is_split_and_floats_are_scaled_from_their_range(tmp_path):
    floats = (IMAGES[:, 0] / 255 * 2 - 1).astype(np.float32)  # without a channel
    path = save(tmp_path / "mine.npz", images=floats, labels=LABELS)
    with pytest.raises(UserError, match=r"not \[0, 1\]"):
        read(path)
    datamodule = read(path, low=-1.0, high=1.0, test_share=0.25)
    pixels = torch.cat([datamodule.split(name).images for name in ("train", "test")])
    assert datamodule.image_shape == (1, 4, 5)
    assert sorted(map(len, (datamodule.split("train"), datamodule.split("test")))) == [5, 15]
    assert pixels.flatten(1).sum(1).sort().values.numpy() == pytest.approx(
        np.sort(IMAGES[:, 0].reshape(20, -1).sum(1) / 255), rel=1e-5
    )


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"data\.file is missing"):
        TensorsDataModule()
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match=r"holds pixels; give images and labels"):
        read(save(tmp_path / "a.npz", pixels=IMAGES))
    with pytest.raises(UserError, match="integer labels"):
        read(save(tmp_path / "b.npz", images=IMAGES, labels=LABELS / 2))
    with pytest.raises(UserError, match="one class alone"):
        read(save(tmp_path / "c.npz", images=IMAGES, labels=LABELS * 0))
    (tmp_path / "d.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "d.npz")
    with pytest.raises(UserError, match="must be above"):
        TensorsDataModule(file="x.npz", low=1.0, high=1.0)


NUMBER = Gaussian(tolerance=1.0)
FIVE_CLASSES = np.broadcast_to(np.arange(5), (20, 4, 5))


@pytest.mark.parametrize(
    ("family", "targets", "outputs", "stored"),
    [
        (NUMBER, np.linspace(-3, 3, 20), (1,), (torch.float32, (1,))),
        (NUMBER, np.arange(40).reshape(20, 2), (2,), (torch.float32, (2,))),
        (GaussianMeanScale(tolerance=1.0), np.ones((20, 2)), (4,), (torch.float32, (2,))),
        (Poisson(), LABELS, (1,), (torch.float32, (1,))),
        (BernoulliProduct(), LABELS[:, None] > np.arange(3), (3,), (torch.float32, (3,))),
        (PixelCategorical(), FIVE_CLASSES.astype(np.uint8), (5, 4, 5), (torch.int64, (4, 5))),
    ],
)
def test_targets_are_those_of_the_task(family, targets, outputs, stored, tmp_path):
    path = save(
        tmp_path / "mine.npz", train_images=IMAGES, train_targets=targets, test_images=IMAGES, test_labels=targets
    )
    datamodule = read(path, family)
    for name in ("train", "test"):
        found = datamodule.split(name).labels
        assert (found.dtype, found.shape[1:]) == stored
        assert np.array_equal(found.numpy(), targets.astype(found.numpy().dtype).reshape(found.shape))
        assert torch.isfinite(family.loss(torch.zeros(20, *outputs), found))
    assert datamodule.output_shape == outputs


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        (NUMBER, np.where(LABELS == 1, np.nan, LABELS), r"finite numbers, of shape \(16, 1\), not .*float64.* to nan"),
        (NUMBER, np.ones((20, 2, 2)), r"of shape \(16, 2\), not torch.float64 of shape \(16, 2, 2\)"),
        (NUMBER, LABELS * 1j, r"must be finite numbers.* not torch.complex128"),
        (Poisson(), LABELS - 1, r"whole numbers from 0.* from -1 to 2"),
        (Poisson(), LABELS / 2, r"whole numbers from 0.* from 0 to 1.5"),
        (BernoulliProduct(), np.full((20, 3), 2), r"0 or 1, of shape \(16, 3\).* from 2 to 2"),
        (PixelCategorical(), FIVE_CLASSES - 1, r"integers from 0 to 3.* from -1 to 3"),
        (PixelCategorical(), FIVE_CLASSES / 4, r"integers from 0.* not torch.float64"),
        (PixelCategorical(), FIVE_CLASSES[:, :3], r"of shape \(16, 4, 5\), not torch.int64 of shape \(16, 3, 5\)"),
        (NUMBER, LABELS[:7], r"and n targets, not \(20, 3, 4, 5\) uint8 and \(7,\)"),
    ],
)
def test_what_is_no_target_of_the_task_is_said_in_one_line(family, targets, said, tmp_path):
    with pytest.raises(UserError, match=f"^data.*: .*{said}"):
        read(save(tmp_path / "mine.npz", images=IMAGES, targets=targets), family)


def test_rows_of_a_table_are_no_pictures(tmp_path):
    rows = np.random.default_rng(0).standard_normal((20, 7)).clip(-5, 5)
    datamodule = read(save(tmp_path / "mine.npz", images=rows, targets=rows[:, 0]), NUMBER, low=-5, high=5)
    assert (datamodule.image_shape, datamodule.pictures) == ((1, 1, 7), False)
    images, targets = datamodule.split("train").first(None)
    assert torch.allclose(10 * images[:, 0, 0, :1] - 5, targets, atol=1e-5)
