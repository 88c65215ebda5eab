import gzip
import itertools
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jacobian_robust.data import (
    CIFAR10DataModule,
    FashionMNISTDataModule,
    ImageDataset,
    MNISTDataModule,
    ToyDataModule,
)
from jacobian_robust.errors import UserError
from jacobian_robust.training.datamodule import LightningImages

RAW = Path(__file__).parents[2] / "data" / "MNIST" / "raw"


@pytest.fixture(scope="module")
def mnist() -> MNISTDataModule:
    datamodule = MNISTDataModule(validation_size=1000)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_a_class_of_ones_own_is_given_labels_that_torch_can_count_with():
    labels = MNISTDataModule()._read(train=False).labels
    assert labels.dtype == torch.int64
    assert torch.nn.functional.one_hot(labels, 10).sum() == 10_000


def test_splits_have_the_asked_sizes_and_cover_the_training_set(mnist):
    assert [len(mnist.split(name)) for name in ("train", "validation", "test")] == [59_000, 1000, 10_000]
    everything = MNISTDataModule(validation_size=0)
    everything.setup("fit")
    assert len(everything.split("train")) == 60_000
    assert everything.val_dataloader() == []
    labels = torch.cat([mnist.split("train").labels, mnist.split("validation").labels])
    assert torch.equal(labels.bincount(), everything.split("train").labels.bincount())
    pixels = mnist.split("train").images.long().sum() + mnist.split("validation").images.long().sum()
    assert pixels == everything.split("train").images.long().sum()


def test_held_out_images_follow_the_split_seed_alone(mnist):
    same, other = (
        MNISTDataModule(validation_size=1000, shuffle_seed=5),
        MNISTDataModule(validation_size=1000, split_seed=1),
    )
    for datamodule in (same, other):
        datamodule.setup("fit")
    assert torch.equal(same.split("validation").images, mnist.split("validation").images)
    assert not torch.equal(other.split("validation").images, mnist.split("validation").images)


def test_batches_are_pixels_in_the_unit_interval_and_labels(mnist):
    images, labels = next(iter(mnist.train_dataloader()))
    assert images.shape == (32, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.shape == (32,)


def test_order_is_a_function_of_seed_and_epoch(mnist):
    def labels(seed, epoch):
        datamodule = MNISTDataModule(validation_size=1000, shuffle_seed=seed)
        datamodule._splits = mnist._splits
        loader = datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))[1].tolist()

    assert labels(0, 3) == labels(0, 3)
    assert labels(0, 3) != labels(0, 4)
    assert labels(0, 3) != labels(1, 3)


def test_in_training_the_images_lie_where_the_steps_are_taken():
    """On a device without memory or arithmetic: only its name shows where a tensor is."""
    datamodule = LightningImages(MNISTDataModule())
    datamodule.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    datamodule.setup("fit")
    images, labels = datamodule.split("train").__getitems__([3, 1])
    assert images.device.type == labels.device.type == "meta"
    assert images.shape == (2, 1, 28, 28)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_batches_of_several_processes_make_up_those_of_one(world_size):
    def batches(rank, of):
        datamodule = MNISTDataModule(batch_size=12)
        datamodule._splits["train"] = ImageDataset(torch.rand(31, 1, 1, 1), torch.arange(31))
        return [labels.tolist() for _, labels in datamodule.train_dataloader(rank, of)]

    alone, parts = batches(0, 1), [batches(rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [len(alone)] * world_size
    for whole, *shared in zip(alone, *parts, strict=True):
        assert len({len(part) for part in shared}) == 1
        assert set(whole) <= {label for part in shared for label in part}
    *full, _ = zip(alone, *parts, strict=True)  # the last batch is filled up with images that come twice
    assert all(sorted(itertools.chain(*shared)) == sorted(whole) for whole, *shared in full)


def test_a_batch_that_processes_cannot_share_evenly_is_refused():
    datamodule = ToyDataModule(batch_size=15)
    datamodule.setup()
    with pytest.raises(UserError, match=r"data\.batch_size=15 cannot be split evenly over 2"):
        datamodule.train_dataloader(0, 2)


@pytest.mark.parametrize(("batch_size", "sizes"), [(100, [33]), (16, [16, 16, 1]), (33, [33])])
def test_an_epoch_sees_every_image_once_whatever_the_batch_size(batch_size, sizes):
    datamodule = MNISTDataModule(batch_size=batch_size)
    images = torch.arange(33, dtype=torch.uint8).view(33, 1, 1, 1)
    datamodule._splits["train"] = ImageDataset(images, torch.arange(33))
    batches = list(datamodule.train_dataloader())
    assert [len(labels) for _, labels in batches] == sizes
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(33))
    assert all(torch.equal((pixels.flatten() * 255).round().long(), labels) for pixels, labels in batches)


def test_test_curves_are_only_for_runs_without_validation_images():
    with pytest.raises(UserError, match="validation_size=0"):
        MNISTDataModule(validate_on_test=True)
    datamodule = MNISTDataModule(validate_on_test=True, validation_size=0)
    datamodule.setup("fit")
    assert datamodule.validation_name == "test"
    assert len(datamodule.val_dataloader().dataset) == 10_000


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves nothing of 60000 images"):
        MNISTDataModule(validation_size=60_000).setup("fit")


def test_a_damaged_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(RAW, raw)
    archive = raw / "t10k-labels-idx1-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is damaged .* restore it"):
        MNISTDataModule(root=str(tmp_path)).prepare_data()


def test_missing_files_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    for cls in (MNISTDataModule, FashionMNISTDataModule):
        with pytest.raises(UserError, match=f"{cls.dataset_class.__name__}: files missing in .* set data.root"):
            cls(root=str(tmp_path / "mistyped" / "data")).prepare_data()
        assert not list(tmp_path.iterdir())


def test_reading_leaves_the_shipped_folder_as_it_was(mnist):
    assert sorted(path.name for path in RAW.iterdir()) == sorted(
        f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )


def test_fashion_mnist_is_found_in_its_directory(tmp_path, monkeypatch):
    """Files of the same format under its name: MNIST's, with the expected sums adjusted."""
    shutil.copytree(RAW, tmp_path / "FashionMNIST" / "raw")
    resources = MNISTDataModule.dataset_class.resources
    monkeypatch.setattr(FashionMNISTDataModule.dataset_class, "resources", resources)
    datamodule = FashionMNISTDataModule(root=str(tmp_path))
    datamodule.prepare_data()
    datamodule.setup("test")
    assert len(datamodule.split("test")) == 10_000


def test_unpacked_and_repacked_files_are_read_and_others_are_named_by_their_hash(tmp_path):
    for archive in RAW.glob("*.gz"):
        (tmp_path / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
    unpacked = MNISTDataModule(root=str(tmp_path))  # no MNIST/raw is asked for
    unpacked.prepare_data()
    assert unpacked.data_name == "MNIST"
    unpacked.setup("test")
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    changed = bytearray(labels.read_bytes())
    changed[8] = 9 - changed[8]
    labels.unlink()
    labels.with_name(labels.name + ".gz").write_bytes(gzip.compress(changed, 1))
    other = MNISTDataModule(root=str(tmp_path))
    other.prepare_data()
    assert re.fullmatch(r"MNIST \([0-9a-f]{12}\)", other.data_name)
    other.setup("test")
    assert torch.equal(other.split("test").images, unpacked.split("test").images)
    assert (other.split("test").labels != unpacked.split("test").labels).sum() == 1
    labels.write_bytes(b"no IDX file, but long enough")
    labels.with_name(labels.name + ".gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte is damaged"):
        MNISTDataModule(root=str(tmp_path)).prepare_data()


def test_sets_of_other_files_are_read_by_torchvision_and_a_missing_argument_is_named(tmp_path):
    class Columns:
        """As QMNIST, whose targets have the class in their first column; and as EMNIST, which must be told a split."""

        def __init__(self, root, split, train, download):
            self.data = torch.zeros(9, 28, 28, dtype=torch.uint8)
            self.targets = torch.arange(9)[:, None].repeat(1, 8)

    class Whole(MNISTDataModule):
        dataset_class = Columns
        arguments = {"split": "digits"}  # noqa: RUF012

    class Unsaid(MNISTDataModule):
        dataset_class = Columns

    datamodule = Whole(root=str(tmp_path), validation_size=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    assert datamodule.split("train").labels.tolist() == list(range(9))
    with pytest.raises(UserError, match=r"Columns: .*'split'.* arguments"):
        Unsaid(root=str(tmp_path)).prepare_data()


def test_cifar10_is_extracted_from_its_archive_and_read_as_it_was_written(cifar10):
    datamodule = CIFAR10DataModule(root=str(cifar10), validation_size=100)
    datamodule.prepare_data()
    datamodule.setup()
    assert [len(datamodule.split(name)) for name in ("train", "validation", "test")] == [200, 100, 60]
    with (cifar10 / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        written = pickle.load(file)
    images, labels = datamodule.split("test").first(None)
    assert images.shape == (60, *datamodule.image_shape)
    # Its format: 1024 numbers of red, then of green, then of blue, row by row.
    assert (images[7, 1, 2, 3] * 255).round() == written["data"][7][1024 + 2 * 32 + 3]
    assert labels.tolist() == written["labels"]
    assert datamodule.split("train").images.dtype == torch.uint8
    (cifar10 / "cifar-10-python.tar.gz").unlink()
    CIFAR10DataModule(root=str(cifar10)).prepare_data()  # raises no error: the files are enough


def test_missing_or_damaged_files_of_cifar10_are_told_in_one_line(tmp_path, cifar10, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    message = "CIFAR10: files missing or damaged in .* put cifar-10-python.tar.gz into .* or set data.root"
    with pytest.raises(UserError, match=message):
        CIFAR10DataModule(root=str(tmp_path / "nothing")).prepare_data()
    CIFAR10DataModule(root=str(cifar10)).prepare_data()
    damaged = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:100])
    CIFAR10DataModule(root=str(cifar10)).prepare_data()  # the archive mends it
    damaged.write_bytes(damaged.read_bytes()[:100])
    (cifar10 / "cifar-10-python.tar.gz").write_bytes(b"damaged too")
    with pytest.raises(UserError, match=message):
        CIFAR10DataModule(root=str(cifar10)).prepare_data()


@pytest.fixture
def toy() -> ToyDataModule:
    datamodule = ToyDataModule(training_size=90, test_size=60, validation_size=30)
    datamodule.setup()
    return datamodule


def test_toy_points_are_of_three_equal_classes_in_the_unit_square(toy):
    assert [len(toy.split(name)) for name in ("train", "validation", "test")] == [60, 30, 60]
    points, labels = toy.split("test").first(None)
    assert points.shape == (60, 1, 1, 2)
    assert points.dtype == torch.float32
    assert points.min() >= 0
    assert points.max() <= 1
    assert labels.bincount().tolist() == [20, 20, 20]


def test_toy_points_follow_the_data_seed_alone_and_no_split_shares_one(toy):
    same, other = (
        ToyDataModule(training_size=90, test_size=60, validation_size=30, **seed)
        for seed in ({"shuffle_seed": 7}, {"data_seed": 1})
    )
    for datamodule in (same, other):
        datamodule.setup()
    names = ("train", "validation", "test")
    points, again, others = (torch.cat([d.split(n).images for n in names]) for d in (toy, same, other))
    assert torch.equal(points, again)
    assert len(torch.cat([points, others]).unique(dim=0)) == 2 * len(points)


def test_without_noise_toy_arms_are_turned_copies_of_each_other():
    datamodule = ToyDataModule(noise=0.0, training_size=2, validation_size=0, test_size=300)
    datamodule.setup("test")
    points, labels = datamodule.split("test").first(None)
    radius = (points.view(-1, 2) - 0.5).norm(dim=1)
    angle = torch.atan2(*(points.view(-1, 2) - 0.5).flip(1).unbind(1))
    start = angle / (2 * torch.pi) - labels / 3 - 0.5 * (radius - 0.08) / 0.34  # of the arm, in turns
    torch.testing.assert_close((start - start.round()).abs(), torch.zeros(300), atol=1e-5, rtol=0)


def test_a_toy_split_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves nothing of 100 points"):
        ToyDataModule(training_size=100, validation_size=100)
