import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jacobian_robust.data import TensorsDataModule
from jacobian_robust.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 5), dtype=np.uint8)
LABELS = np.arange(20) % 4


def read(path, **options):
    datamodule = TensorsDataModule(file=str(path), **options)
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
    with pytest.raises(UserError, match="labels integers"):
        read(save(tmp_path / "b.npz", images=IMAGES, labels=LABELS / 2))
    with pytest.raises(UserError, match="one class alone"):
        read(save(tmp_path / "c.npz", images=IMAGES, labels=LABELS * 0))
    (tmp_path / "d.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "d.npz")
    with pytest.raises(UserError, match="must be above"):
        TensorsDataModule(file="x.npz", low=1.0, high=1.0)
