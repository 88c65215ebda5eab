"""Folders of real digits."""

import numpy as np
import pytest
import torch
from PIL import Image

from jacobian_robust.data import ImageFolderDataModule, MNISTDataModule
from jacobian_robust.errors import UserError


@pytest.fixture(scope="module")
def digits():
    datamodule = MNISTDataModule()
    datamodule.setup("test")
    images, labels = datamodule.split("test").images[:60, 0], datamodule.split("test").labels[:60]
    kept = labels < 3
    return images[kept].numpy(), labels[kept].tolist()


def written(root, digits, places=("train", "test"), names=("nought", "one", "two"), change=lambda image: image):
    for place in places:
        for number, (image, label) in enumerate(zip(*digits, strict=True)):
            folder = root / place / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            change(Image.fromarray(image)).save(folder / f"{number:03}.png")
    return root


def read(root, tmp_path, **options):
    datamodule = ImageFolderDataModule(root=str(root), cache=str(tmp_path / "cache"), **options)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_a_folder_is_read_as_it_was_written(digits, tmp_path):
    datamodule = read(written(tmp_path / "digits", digits), tmp_path)
    images, labels = digits
    assert (datamodule.classes, datamodule.class_names) == (3, ("nought", "one", "two"))
    assert datamodule.image_shape == (1, 28, 28)
    order = np.argsort(labels, kind="stable")
    assert torch.equal(datamodule.split("train").images[:, 0], torch.from_numpy(images[order]))
    assert datamodule.split("test").labels.tolist() == sorted(labels)


def test_the_cache_is_used_until_a_file_changes(digits, tmp_path, monkeypatch):
    root = written(tmp_path / "digits", digits)
    first = read(root, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("jacobian_robust.data.folder._decode", lambda *_: pytest.fail("decoded again"))
        again = read(root, tmp_path)
    assert torch.equal(first.split("train").images, again.split("train").images)
    assert first.data_name == again.data_name
    changed = next((root / "train" / "one").iterdir())
    Image.new("L", (28, 28), 255).save(changed)
    other = read(root, tmp_path)
    assert not torch.equal(first.split("train").images, other.split("train").images)
    assert first.data_name != other.data_name
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(read(root, tmp_path).split("train").images, other.split("train").images)


def test_what_does_not_fit_into_memory_is_the_same_read_by_workers(digits, tmp_path):
    root = written(tmp_path / "digits", digits, change=lambda image: image.convert("RGB"))
    kept, lazy = (read(root, tmp_path, validation_size=5, batch_size=4, memory=gb, workers=1) for gb in (1.0, 0.0))
    for split in ("train", "validation", "test"):
        for mine, others in zip(kept.split(split).first(None), lazy.split(split).first(None), strict=True):
            assert torch.equal(mine, others)
    batches = [list(datamodule.train_dataloader()) for datamodule in (kept, lazy)]
    assert len(batches[0]) > 3
    for (images, labels), (others, theirs) in zip(*batches, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, theirs)
    assert kept.image_shape == (3, 28, 28)


def test_pictures_of_several_sizes_are_scaled_to_one(digits, tmp_path):
    sizes = iter(range(20, 10**6))
    root = written(tmp_path / "digits", digits, change=lambda image: image.resize((next(sizes), 30)))
    with pytest.raises(UserError, match=r"\.png has 30×2\d pixels, .* give data\.image_size"):
        read(root, tmp_path)
    assert read(root, tmp_path, image_size=[12, 9]).image_shape == (1, 12, 9)
    assert read(root, tmp_path, image_size=8, channels=3).split("test").images.shape[1:] == (3, 8, 8)


def test_without_a_test_folder_a_part_is_kept_for_it(digits, tmp_path):
    root = written(tmp_path / "digits", digits, places=(".",))
    datamodule, same, other = (read(root, tmp_path, **seed) for seed in ({}, {"shuffle_seed": 1}, {"split_seed": 1}))
    sizes = [len(datamodule.split(name)) for name in ("train", "test")]
    assert sizes == [len(digits[1]) - round(0.2 * len(digits[1])), round(0.2 * len(digits[1]))]
    assert torch.equal(datamodule.split("test").images, same.split("test").images)
    assert not torch.equal(datamodule.split("test").images, other.split("test").images)


def test_mistakes_are_told_in_a_line(digits, tmp_path):
    with pytest.raises(UserError, match=r"data\.root is missing"):
        ImageFolderDataModule()
    with pytest.raises(UserError, match="is no folder"):
        read(tmp_path / "nowhere", tmp_path)
    root = written(tmp_path / "digits", digits)
    (root / "test" / "three").mkdir()
    with pytest.raises(UserError, match="class three is not in both"):
        read(root, tmp_path)
    (root / "train" / "three").mkdir()
    with pytest.raises(UserError, match=r"three holds no pictures"):
        read(root, tmp_path)
    for place in ("train", "test"):
        (root / place / "three").rmdir()
    colour = root / "train" / "two" / "zz.png"
    Image.new("RGB", (28, 28)).save(colour)
    with pytest.raises(UserError, match=r"zz\.png is in colour.*data\.channels=3"):
        read(root, tmp_path)
    assert read(root, tmp_path, channels=1).image_shape == (1, 28, 28)
    colour.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"zz\.png cannot be read"):
        read(root, tmp_path)
    Image.new("I;16", (28, 28)).save(colour)
    with pytest.raises(UserError, match=r"zz\.png is a picture of mode I;16"):
        read(root, tmp_path)
