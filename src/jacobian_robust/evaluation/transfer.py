"""The models that others' examples are transferred from: those of an attack, and of the sanity checks."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from jacobian_robust.attacks import Transfer
from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import Classifier, names_of, placed, require_attacks
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.files import in_project
from jacobian_robust.models import PixelInput
from jacobian_robust.robustness.certificates import require_certifiable

__all__ = ["require_possible", "source_model", "stand_in", "transferable"]


def require_possible(evaluation: Evaluation, datamodule: ImageDataModule, networks: Sequence[nn.Module]) -> None:
    """Raise a UserError unless models that are yet to be trained can be evaluated so.

    Args:
        evaluation: how they will be evaluated.
        datamodule: on what.
        networks: the models, wherever they are and in whatever mode.
    """
    models = len(networks)
    evaluation = evaluation.for_family(datamodule.family)
    datamodule.require(evaluation.split)
    require_attacks(evaluation, datamodule)
    for network in networks if evaluation.certificates else ():
        trial = copy.deepcopy(network).cpu().eval()
        require_certifiable(evaluation.certificates, trial, torch.zeros(1, *datamodule.image_shape))
    evaluation, sources = transferable(evaluation, datamodule, models, trust=False, network=None, pixels=None)
    if models == 1 and not sources:
        list(_stand_ins(evaluation, datamodule, trust=False))


def transferable(
    evaluation: Evaluation,
    datamodule: ImageDataModule,
    models: int,
    *,
    trust: bool,
    network: nn.Module | None,
    pixels: dict[str, Any] | None,
) -> tuple[Evaluation, dict[str, list[Classifier]]]:
    """Return the evaluation without attacks that have no model to transfer from, and the models that others name.

    Raises:
        UserError: if no attack is left, or a named model cannot be read.
    """
    sources, attacks = {}, []
    for attack in (attack.for_images(datamodule.image_shape) for attack in evaluation.attacks):
        if isinstance(attack, Transfer) and attack.source:
            checkpoints = [load_checkpoint(path, trust=trust) for path in find_checkpoints([attack.source])]
            classifiers = [
                placed(source_model(checkpoint, network, pixels), datamodule, checkpoint, gradient=True)
                for checkpoint in checkpoints
            ]
            sources[attack.name] = [
                Classifier(name, checkpoint, classifier, datamodule)
                for name, checkpoint, classifier in zip(names_of(checkpoints), checkpoints, classifiers, strict=True)
            ]
        elif isinstance(attack, Transfer) and models == 1:
            hint = f"name one, attack.{attack.name}.source=CHECKPOINT, or evaluate two checkpoints together"
            if len(evaluation.attacks) == 1:
                raise UserError(f"{attack.name}: there is no other model to transfer examples from: {hint}")
            Console().print(f"{attack.name} is left out, there is no other model to transfer from: {hint}")
            continue
        attacks.append(attack)
    return replace(evaluation, attacks=tuple(attacks)), sources


def source_model(checkpoint: Checkpoint, network: nn.Module | None, pixels: dict[str, Any] | None) -> nn.Module:
    """Return a classifier to transfer examples from: one of this project's takes pixels in [0, 1] at any rate."""
    classifier = checkpoint.model(None if checkpoint.brings_model else network)
    return PixelInput(classifier, **pixels).eval() if pixels and not checkpoint.config else classifier


def stand_in(models: Sequence[Classifier], evaluation: Evaluation, *, trust: bool) -> list[Classifier]:
    """Return the model whose examples are tried, in the checks, on a classifier that is evaluated alone, if one fits.

    One fits that was trained on the same data and is not the classifier itself.

    Raises:
        UserError: if one that is named cannot be read.
    """
    if len(models) > 1:
        return []
    [classifier] = models
    for source in _stand_ins(evaluation, classifier.datamodule, trust=trust):
        if not _same_weights(source.network, classifier.network):
            return [source]
    return []


def _stand_ins(evaluation: Evaluation, datamodule: ImageDataModule, *, trust: bool) -> Iterator[Classifier]:
    """Read, of the models that ``sanity_source`` names, those that were trained for the same task on the same data."""
    for place in evaluation.sanity_sources if evaluation.sanity_images else ():
        for path in find_checkpoints([in_project(place)]):
            checkpoint = load_checkpoint(path, trust=trust)
            if not checkpoint.config:
                raise UserError(f"sanity_source={place}: does not say what it was trained on; name one of train.py")
            alike = type(checkpoint.family()) is type(datamodule.family)
            if alike and checkpoint.datamodule().data_name == datamodule.data_name:
                network = placed(checkpoint.model(), datamodule, checkpoint, gradient=True)
                yield Classifier(path.stem, checkpoint, network, datamodule)


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    mine, others = first.state_dict(), second.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
