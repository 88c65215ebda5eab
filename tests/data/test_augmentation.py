import pytest
import torch

from jacobian_robust.data import Augmentation, ToyDataModule

IMAGES = torch.rand(40, 2, 5, 7, generator=torch.Generator().manual_seed(0))


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_rest():
    flipped = Augmentation(flip=True)(IMAGES, 0)
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, IMAGES, strict=True)]
    same = [torch.equal(new, old) for new, old in zip(flipped, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 8 < sum(mirrored) < 32


def test_a_crop_is_a_part_of_the_padded_image_at_every_place():
    cropped = Augmentation(padding=1)(IMAGES, 0)
    padded = torch.nn.functional.pad(IMAGES, [1] * 4)
    places = set()
    for new, old in zip(cropped, padded, strict=True):
        (place,) = [(y, x) for y in range(3) for x in range(3) if torch.equal(new, old[:, y : y + 5, x : x + 7])]
        places.add(place)
    assert len(places) == 9


def test_a_resumed_epoch_sees_the_images_that_it_would_have_seen_and_a_validation_sees_them_as_they_are():
    def datamodule():
        made = ToyDataModule(training_size=90, validation_size=30, batch_size=8)
        made.augmentation = Augmentation(flip=True, padding=1)
        made.setup("fit")
        return made

    whole = datamodule().train_dataloader()
    whole.sampler.set_epoch(3)
    state = torch.get_rng_state()
    batches = list(whole)
    assert torch.equal(torch.get_rng_state(), state)
    resumed = datamodule().train_dataloader()
    resumed.sampler.set_epoch(3)
    resumed.load_state_dict({"batches": 2})
    for (images, _), (others, _) in zip(batches[2:], resumed, strict=True):
        assert torch.equal(images, others)
    whole.sampler.set_epoch(4)
    assert not torch.equal(next(iter(whole))[0], batches[0][0])
    made = datamodule()
    assert torch.equal(next(iter(made.val_dataloader()))[0], made.split("validation").images)


def test_no_change_is_none():
    assert torch.equal(Augmentation()(IMAGES, 3), IMAGES)
    with pytest.raises(ValueError, match="padding"):
        Augmentation(padding=-1)
