"""From checkpoints to a report of what withstands attacks."""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pydantic import BaseModel, Field, ValidationError, model_validator
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from jacobian_robust.attacks import Attack, GaussianNoise, Norm, Square, Transfer, UniformNoise
from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.config import build, build_each, check, plain, read_options
from jacobian_robust.data import FashionMNISTDataModule, ImageDataModule, MNISTDataModule
from jacobian_robust.errors import UserError, describe
from jacobian_robust.files import claimed, distinct_names, from_here, in_project, write_atomically
from jacobian_robust.models import PixelInput, SinglePrecision
from jacobian_robust.options import STRICT, Count, Flag, NonEmpty, Seed, Size
from jacobian_robust.provenance import versions
from jacobian_robust.reporting import plots
from jacobian_robust.reporting.console import print_results, print_simplifications
from jacobian_robust.reporting.html import write_report
from jacobian_robust.reporting.wandb import WandbOptions, full_id, log_evaluation, read_logger, run_url, wandb_run
from jacobian_robust.robustness import prediction as first_order
from jacobian_robust.robustness import reliability
from jacobian_robust.robustness.budgets import Sweep, predictions, sweep
from jacobian_robust.robustness.sanity import Check, checks_of, sanity_checks, verdict
from jacobian_robust.robustness.schema import (
    AttackOutcome,
    Budget,
    ClassAccuracy,
    FirstOrder,
    Group,
    Model,
    Results,
    SanityCheck,
    Threat,
    groups,
    settings_hash,
    table_rows,
)
from jacobian_robust.robustness.workers import Attackers, full_precision, several
from jacobian_robust.training.memory import keep_freed_memory
from jacobian_robust.training.processes import ProcessDied
from jacobian_robust_studies import simplifications

__all__ = ["Evaluation", "Subject", "evaluate", "read_evaluation", "report", "require_possible", "subjects"]

L2_RADII = (0.5, 1.0, 1.5, 2.0)
"""Where the note's condition is looked at if no ℓ2 budget was attacked."""


class _Options(BaseModel):
    """The scalars of ``conf/evaluate.yaml``, which ``conf/train.yaml`` has too."""

    seed: Seed
    limit: Count | None
    split: Literal["test", "validation"]
    independent: Flag
    sanity_images: Size
    sanity_source: NonEmpty | list[NonEmpty] | None
    geometry_images: Size | None
    reliability: Flag
    diagnostics: Literal["simplifications", None]
    diagnostics_images: Count
    processes: Count


EVALUATION_OPTIONS = (*_Options.model_fields,)
"""Those of them that are scalars, by name."""


class _Places(BaseModel):
    """The scalars that ``conf/evaluate.yaml`` has alone."""

    checkpoint: NonEmpty | list[NonEmpty] | None
    resume: Flag
    trust: Flag
    output_dir: NonEmpty


Level = Annotated[float, Field(ge=-1e6, le=1e6)]
"""What a pixel may be called; float32 can normalise it."""

Spread = Annotated[float, Field(ge=1e-6, le=1e6)]


class _Input(BaseModel):
    """What a model takes for a pixel, if not a number in [0, 1]."""

    model_config = STRICT

    low: Level = 0.0
    high: Level = 1.0
    mean: Level | list[Level] = 0.0
    std: Spread | list[Spread] = 1.0

    @model_validator(mode="after")
    def _invertible(self) -> "_Input":
        if self.high - self.low < 1e-6:
            raise ValueError(f"high must be above low, {self.low:g}")
        return self


@dataclass(frozen=True)
class Evaluation:
    """How classifiers are evaluated.

    Attributes:
        attacks: in the order in which they meet the images, cheap ones first; each has another name.
        seed: of the attacks.
        limit: how many of the split's first images; ``None`` for all.
        split: ``test``, or ``validation`` to choose hyper-parameters by: the images held out from training.
        independent: attack all correct images anew at each budget, as the note does.
        sanity_images: how many images the sanity checks attack anew; 0 for no checks.
        sanity_source: checkpoints of which the first that fits has its examples transferred to a classifier that is
            checked alone; a relative path is looked for in the working directory, then in the project's.
        geometry_images: for how many images the geometry's prediction is compared with the smallest perturbation found;
            ``None`` for all.
        reliability: whether to look at noise, calibration and images of another kind.
        diagnostics: ``simplifications`` to measure the note's six (:mod:`jacobian_robust_studies.simplifications`).
        diagnostics_images: on how many images of the split, and on as many training images.
        processes: how many share the attacked batches; the results do not depend on it.
        data: the data to evaluate on, instead of what each checkpoint was trained on.
    """

    attacks: tuple[Attack, ...]
    seed: int = 0
    limit: int | None = None
    split: Literal["test", "validation"] = "test"
    independent: bool = False
    sanity_images: int = 0
    sanity_source: str | Sequence[str] | None = None
    geometry_images: int | None = 0
    reliability: bool = False
    diagnostics: Literal["simplifications"] | None = None
    diagnostics_images: int = 500
    processes: int = 1
    data: ImageDataModule | None = None

    @property
    def norms(self) -> list[Norm]:
        """The norms of the attacks, in their order."""
        return list(dict.fromkeys(attack.norm for attack in self.attacks))

    @property
    def sanity_sources(self) -> Sequence[str]:
        """The places that ``sanity_source`` names."""
        return [self.sanity_source] if isinstance(self.sanity_source, str) else self.sanity_source or []

    @property
    def needs_gradient(self) -> bool:
        """Whether the classifiers have to be differentiable: not for random search, noise and named sources."""
        followed = any(
            not isinstance(attack, Square | UniformNoise | GaussianNoise)
            and not (isinstance(attack, Transfer) and attack.source)
            for attack in self.attacks
        )
        return followed or self.sanity_images > 0 or self.geometry_images != 0 or self.diagnostics is not None


@dataclass(frozen=True)
class Subject:
    """A classifier to evaluate.

    Attributes:
        name: the shortest distinct name of where it was found.
        checkpoint: what its file says.
        network: returns logits for pixels in [0, 1]; on the device, in evaluation mode.
        datamodule: what to evaluate it on.
    """

    name: str
    checkpoint: Checkpoint
    network: nn.Module
    datamodule: ImageDataModule


def read_evaluation(cfg: DictConfig) -> Evaluation:
    """Return the evaluation that a config asks for.

    Raises:
        UserError: if an option is at fault.
    """
    evaluation = Evaluation(tuple(build_each(cfg, "attack", Attack)), **dict(read_options(_Options, cfg)))
    for place in evaluation.sanity_sources:
        if not in_project(place).exists():
            raise UserError(f"sanity_source={place}: no such file or directory; null for none")
    for attack in evaluation.attacks:
        if isinstance(attack, Transfer) and attack.source and not Path(attack.source).exists():
            raise UserError(f"attack.{attack.name}.source={attack.source}: no such file or directory")
    return evaluation


def evaluate(cfg: DictConfig) -> Results:
    """Evaluate as ``conf/evaluate.yaml`` describes, and return what ``robustness.json`` holds.

    Raises:
        UserError: if an option, a checkpoint, a data file or a directory is at fault.
    """
    keep_freed_memory()
    check(cfg, {*EVALUATION_OPTIONS, *_Places.model_fields, "input"}, ("attack", "logger", "data", "model"))
    options = read_options(_Places, cfg)
    evaluation = read_evaluation(cfg)
    if cfg.get("data"):
        evaluation = replace(evaluation, data=build(cfg, "data", ImageDataModule))
    network = build(cfg, "model", nn.Module, optional=True)
    named = options.checkpoint if isinstance(options.checkpoint, list) else [options.checkpoint or ""]
    named = [place for place in named if place]
    if named or network is None:
        checkpoints = [load_checkpoint(path, trust=options.trust) for path in find_checkpoints(named)]
    else:
        checkpoints = [Checkpoint(None, None)]
    directory = from_here(options.output_dir)
    pixels = _pixels(cfg)
    named_models = subjects(checkpoints, evaluation, network=network, pixels=pixels)
    try:
        return report(
            named_models,
            evaluation,
            directory=directory,
            group=directory.name,
            logger=read_logger(cfg),
            config=plain(cfg, without=("resume", "processes")) | {"output_dir": str(directory)},
            resume=options.resume,
            trust=options.trust,
            network=network,
            pixels=pixels,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with the same options, hydra.run.dir={directory} and resume=true") from None


def _pixels(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of :class:`PixelInput`, or none if the models take pixels in [0, 1]."""
    try:
        stated = plain(cfg).get("input")
        options = _Input() if stated is None else _Input.model_validate(stated)
    except ValidationError as error:
        raise UserError(describe(error, "input")) from error
    return {} if options == _Input() else options.model_dump()


def subjects(
    checkpoints: Sequence[Checkpoint],
    evaluation: Evaluation,
    *,
    network: nn.Module | None = None,
    pixels: dict[str, Any] | None = None,
) -> list[Subject]:
    """Return the classifiers of checkpoints, ready to be evaluated.

    Args:
        checkpoints: as read from files.
        evaluation: how they are evaluated.
        network: a classifier to load the weights into, instead of the one that each checkpoint names.
        pixels: arguments of :class:`PixelInput`, for classifiers that want other numbers than pixels in [0, 1].

    Raises:
        UserError: if one cannot be made, does not return logits for the data's classes, or its data are at fault.
    """
    found = []
    for checkpoint, name in zip(checkpoints, _names(checkpoints), strict=True):
        classifier = checkpoint.model(network)
        if pixels:
            classifier = PixelInput(classifier, **pixels).eval()
        datamodule = evaluation.data or checkpoint.datamodule()
        datamodule.require(evaluation.split)
        _require_attacks(evaluation, datamodule)
        datamodule.prepare_data()
        classifier = _placed(classifier, datamodule, checkpoint, gradient=evaluation.needs_gradient)
        found.append(Subject(name, checkpoint, classifier, datamodule))
    if len({_images_of(subject.datamodule, evaluation) for subject in found}) > 1:
        raise UserError(
            f"the checkpoints were trained on other data, of which their {evaluation.split} images differ, and cannot "
            "share a table: evaluate them apart, or on the same, data=NAME"
        )
    return found


def _images_of(datamodule: ImageDataModule, evaluation: Evaluation) -> tuple[str | int, ...]:
    """Return what decides which images are evaluated."""
    held_out = (datamodule.validation_size, datamodule.split_seed) if evaluation.split == "validation" else ()
    return (datamodule.data_name, *held_out)


def _described(datamodule: ImageDataModule, evaluation: Evaluation) -> str:
    """Return in words which images are evaluated: evaluations of others are not put into one table."""
    name, *held_out = _images_of(datamodule, evaluation)
    of = f" ({held_out[0]} held out by split_seed {held_out[1]})" if held_out else ""
    return f"{name} {evaluation.split}{of}"


def _placed(network: nn.Module, datamodule: ImageDataModule, checkpoint: Checkpoint, *, gradient: bool) -> nn.Module:
    """Return a classifier on the device, with logits in float32.

    Raises:
        UserError: if it does not return logits for the data's classes, or has no gradient though one is needed.
    """
    network = network.to(_device())
    what = f"checkpoint {checkpoint.path}" if checkpoint.path else "model"
    for batch in (3, 1):  # survivors can be any number
        images = torch.zeros(batch, *datamodule.image_shape, device=_device(), requires_grad=True)
        try:
            logits = network(images)
        except Exception as error:  # a foreign model can fail in any way
            of = f"{batch} images" if batch > 1 else "1 image"
            raise UserError(
                f"{what}: takes no batch of {of} of shape {datamodule.image_shape}: {describe(error)}"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (batch, datamodule.classes):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{what}: must return (batch, {datamodule.classes}) logits, not {shape} for a batch of {batch}"
            )
        if not logits.is_floating_point():
            raise UserError(f"{what}: must return logits, not numbers of type {logits.dtype}")
        if logits.isnan().all():
            raise UserError(f"{what}: returns nan for black images: an evaluation would say nothing")
        if gradient and not _reaches(logits, images):
            raise UserError(
                f"{what}: its logits have no gradient with respect to the image (detached, or computed outside torch), "
                "which this evaluation needs; without, there are attack=[square,square_l2] with sanity_images=0, "
                "geometry_images=0 and diagnostics=null"
            )
    return network if logits.dtype == torch.float32 else SinglePrecision(network).eval()


def _reaches(logits: Tensor, images: Tensor) -> bool:
    """Return whether logits have a gradient with respect to the images, which may be zero."""
    if not logits.requires_grad:
        return False
    return torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] is not None


def report(
    models: Sequence[Subject],
    evaluation: Evaluation,
    *,
    directory: Path,
    logger: WandbOptions | None,
    group: str,
    config: dict[str, Any],
    resume: bool = False,
    trust: bool = False,
    network: nn.Module | None = None,
    pixels: dict[str, Any] | None = None,
) -> Results:
    """Attack classifiers, write the report into ``directory`` and print it; return what ``robustness.json`` holds.

    Args:
        models: the classifiers.
        evaluation: how to evaluate them.
        directory: for the results; it holds none yet.
        logger: where else to log.
        group: what the W&B run is shown under.
        config: plain containers, for the logger and ``config.yaml``.
        resume: go on with an interrupted evaluation of the same configuration in ``directory``; a finished one of the
            same weights is returned as it is.
        trust: also read sources of examples whose reading can run any code that is in them.
        network: a classifier to load the weights of a source into that does not say what it is.
        pixels: arguments of :class:`PixelInput`, for sources that this project did not train.

    Raises:
        UserError: if the directory is at fault, before anything is attacked.
    """
    evaluation, sources = _transferable(
        *(evaluation, models[0].datamodule, len(models)), trust=trust, network=network, pixels=pixels
    )
    checked_with = list(itertools.chain(*sources.values())) or _stand_in(models, evaluation, trust=trust)
    names = "+".join(attack.name for attack in evaluation.attacks)
    trained = {subject.name: subject.checkpoint.wandb for subject in models if subject.checkpoint.wandb}
    finished = directory / "robustness.json"
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(directory, config, resume=resume))
        if finished.is_file():
            results = _finished(finished, models)
            Console().print(f"evaluated already → {finished}", soft_wrap=True)
            return results
        identity = directory / PROGRESS / "wandb_run"
        run = stack.enter_context(
            wandb_run(
                logger,
                directory=directory,
                group=group,
                name=f"{names}-{directory.resolve().name}"[:128],
                job_type="evaluation",
                tags=[attack.name for attack in evaluation.attacks],
                config=config | {"training_runs": trained},
                notes="".join(f"{name} was trained in run {run_url(of) or of}.\n" for name, of in trained.items()),
                resumed=identity.read_text() if identity.is_file() else None,
            )
        )
        if run is not None:
            identity.parent.mkdir(exist_ok=True)
            with write_atomically(identity) as file:
                file.write(full_id(run))
        followed = [subject.network for subject in (*models, *checked_with)]
        try:
            with full_precision(), several(evaluation.processes, followed) as attackers:
                measured = [
                    _measure(models, i, evaluation, sources, checked_with, directory, attackers)
                    for i in range(len(models))
                ]
        except ProcessDied as error:
            raise UserError(f"attacking {error}; the same with resume=true goes on, with processes=1 alone") from error
        results = Results(
            split=evaluation.split,
            independent=evaluation.independent,
            seed=evaluation.seed,
            device=_device().type,
            versions=versions(),
            attacks={attack.name: _parameters(attack) for attack in evaluation.attacks},
            models=[model for model, _ in measured],
        )
        alike = groups(results.models)
        studies = [details.study for _, details in measured if details.study is not None]
        simplified = _simplified(results, studies)
        points = _points([details for _, details in measured])
        figures = plots.save(_figures(results, alike, [details for _, details in measured], points), directory)
        with write_atomically(directory / "robustness.csv") as file:
            rows = table_rows(results)
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with write_atomically(directory / "images.csv") as file:
            csv.writer(file).writerows(_image_rows(results, [details for _, details in measured]))
        if simplified is not None:
            with write_atomically(directory / "simplifications.csv") as file:
                csv.writer(file).writerows(simplifications.image_rows(studies))
            with write_atomically(directory / "simplifications.json") as file:
                file.write(simplified.model_dump_json(indent=2))
        write_report(directory / "report.html", results, alike, figures, config, simplified)
        if run is not None:
            log_evaluation(run, results, alike, rows, points, figures, directory / "report.html")
        with write_atomically(finished) as file:  # last: it says that the evaluation is whole
            file.write(results.model_dump_json(indent=2))
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    print_results(results, alike)
    if simplified is not None:
        print_simplifications(simplified)
    Console().print(f"results: {directory}/report.html, robustness.json, .csv, images.csv, *.png", soft_wrap=True)
    return results


def _finished(file: Path, models: Sequence[Subject]) -> Results:
    """Return a finished evaluation of these models.

    Raises:
        UserError: if it cannot be read, or is of other weights: the same options can name another file's by now.
    """
    try:
        results = Results.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"{file} is damaged, or of another version: choose another hydra.run.dir") from error
    if [model.sha256 for model in results.models] != [_sha256(subject) for subject in models]:
        raise UserError(
            f"{file} is the evaluation of other weights than those that are there now: to evaluate these, choose "
            "another hydra.run.dir"
        )
    return results


def require_possible(evaluation: Evaluation, datamodule: ImageDataModule, models: int) -> None:
    """Raise a UserError unless models that are yet to be trained can be evaluated so.

    Args:
        evaluation: how they will be evaluated.
        datamodule: on what.
        models: how many of them.
    """
    datamodule.require(evaluation.split)
    _require_attacks(evaluation, datamodule)
    evaluation, sources = _transferable(evaluation, datamodule, models, trust=False, network=None, pixels=None)
    if models == 1 and not sources:
        list(_stand_ins(evaluation, datamodule, trust=False))


def _require_attacks(evaluation: Evaluation, datamodule: ImageDataModule) -> None:
    """Raise a UserError if an attack is not for such images, or so few classes: before others have taken their time."""
    for attack in evaluation.attacks:
        attack.require(datamodule.classes, datamodule.image_shape)


def _transferable(
    evaluation: Evaluation,
    datamodule: ImageDataModule,
    models: int,
    *,
    trust: bool,
    network: nn.Module | None,
    pixels: dict[str, Any] | None,
) -> tuple[Evaluation, dict[str, list[Subject]]]:
    """Return the evaluation without attacks that have no model to transfer from, and the models that others name.

    Raises:
        UserError: if no attack is left, or a named model cannot be read.
    """
    sources, attacks = {}, []
    for attack in evaluation.attacks:
        if isinstance(attack, Transfer) and attack.source:
            checkpoints = [load_checkpoint(path, trust=trust) for path in find_checkpoints([attack.source])]
            classifiers = [
                _placed(_source(checkpoint, network, pixels), datamodule, checkpoint, gradient=True)
                for checkpoint in checkpoints
            ]
            sources[attack.name] = [
                Subject(name, checkpoint, classifier, datamodule)
                for name, checkpoint, classifier in zip(_names(checkpoints), checkpoints, classifiers, strict=True)
            ]
        elif isinstance(attack, Transfer) and models == 1:
            hint = f"name one, attack.{attack.name}.source=CHECKPOINT, or evaluate two checkpoints together"
            if len(evaluation.attacks) == 1:
                raise UserError(f"{attack.name}: there is no other model to transfer examples from: {hint}")
            Console().print(f"{attack.name} is left out, there is no other model to transfer from: {hint}")
            continue
        attacks.append(attack)
    return replace(evaluation, attacks=tuple(attacks)), sources


def _source(checkpoint: Checkpoint, network: nn.Module | None, pixels: dict[str, Any] | None) -> nn.Module:
    """Return a classifier to transfer examples from: one of this project's takes pixels in [0, 1] at any rate."""
    classifier = checkpoint.model(None if checkpoint.brings_model else network)
    return PixelInput(classifier, **pixels).eval() if pixels and not checkpoint.config else classifier


def _stand_in(models: Sequence[Subject], evaluation: Evaluation, *, trust: bool) -> list[Subject]:
    """Return the model whose examples a classifier meets in its checks that has no other beside it, if one fits.

    One fits that was trained on the same data and is not the classifier itself.

    Raises:
        UserError: if one that is named cannot be read.
    """
    if len(models) > 1:
        return []
    [subject] = models
    for source in _stand_ins(evaluation, subject.datamodule, trust=trust):
        if not _same_weights(source.network, subject.network):
            return [source]
    return []


def _stand_ins(evaluation: Evaluation, datamodule: ImageDataModule, *, trust: bool) -> Iterator[Subject]:
    """Read, of the models that ``sanity_source`` names, those that were trained on the same data."""
    for place in evaluation.sanity_sources if evaluation.sanity_images else ():
        for path in find_checkpoints([in_project(place)]):
            checkpoint = load_checkpoint(path, trust=trust)
            if not checkpoint.config:
                raise UserError(f"sanity_source={place}: does not say what it was trained on; name one of train.py")
            if checkpoint.datamodule().data_name == datamodule.data_name:
                network = _placed(checkpoint.model(), datamodule, checkpoint, gradient=True)
                yield Subject(path.stem, checkpoint, network, datamodule)


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    mine, others = first.state_dict(), second.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def _parameters(attack: Attack) -> dict[str, Any]:
    """Return an attack's class and parameters, as JSON has them."""
    parameters = {key: value for key, value in asdict(attack).items() if key != "name"}
    plain_parameters: dict[str, Any] = json.loads(json.dumps({"attack": type(attack).__name__} | parameters))
    return plain_parameters


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the shortest distinct names: the run directories, less what they share from the left."""
    files = [checkpoint.path.resolve() if checkpoint.path else Path("model") for checkpoint in checkpoints]
    in_run = ("checkpoints", "last.ckpt")
    runs = [file.parents[1] if file.parts[-2:] == in_run else file.with_suffix("") for file in files]
    return distinct_names(runs if len(set(runs)) == len(runs) else files)  # or files that differ in their suffix alone


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


PROGRESS = "progress"
"""Directory of an unfinished evaluation's state, within its own."""


class _FileJournal:
    """Keeps a sweep's state in a file, replaced at most every few seconds.

    Args:
        path: the file.
        identity: of what is attacked and how; the state of anything else is not resumed.
    """

    SECONDS = 5.0

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._saved = time.monotonic()
        path.parent.mkdir(exist_ok=True)

    def load(self) -> dict[str, Any] | None:
        try:
            stored = torch.load(self.path, weights_only=True, map_location=_device())
            identity, state = stored["identity"], dict(stored["state"])
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise UserError(
                f"{self.path} cannot be read as the progress of an evaluation ({type(error).__name__}): delete it, and "
                "its part begins anew"
            ) from error
        if identity != self.identity:
            raise UserError(
                f"{self.path} is the progress of another evaluation (other weights, options or versions, or on another "
                "device): finish it with those, or choose another hydra.run.dir"
            )
        return state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - self._saved >= self.SECONDS:
            self.keep(state())

    def keep(self, state: dict[str, Any]) -> None:
        scratch = self.path.with_suffix(".part")
        torch.save({"identity": self.identity, "state": state}, scratch)
        scratch.replace(self.path)
        self._saved = time.monotonic()


def _once(journal: _FileJournal, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was made before an interruption, or else make it and keep it."""
    found = journal.load()
    if found is None:
        found = make()
        journal.keep(found)
    return found


class _Bars:
    """A progress bar for each attack at each budget, with how many images stand so far."""

    def __init__(self, name: str, norm: Norm) -> None:
        self.name = name
        self.symbol = plots.SYMBOLS[norm]
        self._of: tuple[str, float] | None = None
        self._bar: tqdm | None = None

    def __call__(self, attack: str, eps: float, met: int, of: int, standing: int) -> None:
        if self._of != (attack, eps):
            self.close()
            self._of = (attack, eps)
            self._bar = tqdm(total=of, desc=f"{attack} {self.symbol}={eps:g} on {self.name}", unit="image")
        assert self._bar is not None
        self._bar.set_postfix(standing=standing, refresh=False)
        self._bar.update(met - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.total = self._bar.n  # later starts met fewer images than the first
            self._bar.refresh()
            self._bar.close()


@dataclass(frozen=True)
class _Details:
    """What is known of each image, for the figures and ``images.csv``."""

    name: str
    labels: Tensor
    confidence: Tensor
    sweeps: list[Sweep]
    radii: first_order.Radii | None
    smallest: Tensor | None
    study: simplifications.Study | None
    pictures: bool


def _measure(
    models: Sequence[Subject],
    i: int,
    evaluation: Evaluation,
    sources: dict[str, list[Subject]],
    checked_with: Sequence[Subject],
    directory: Path,
    attackers: Attackers,
) -> tuple[Model, _Details]:
    """Evaluate one of the models; the others serve to transfer examples from, for the checks those further ones too."""
    subject, progress = models[i], directory / PROGRESS
    others = [model for number, model in enumerate(models) if number != i]
    subject.datamodule.setup("test" if evaluation.split == "test" else "validate")
    split = subject.datamodule.split(evaluation.split)
    images, labels = (tensor.to(_device()) for tensor in split.first(evaluation.limit))
    transfers = {attack.name: others for attack in evaluation.attacks if isinstance(attack, Transfer)}
    sweeps = [
        _sweep(
            *(subject, images, labels, norm, transfers | sources, evaluation),
            progress / f"{i}_{norm}.pt",
            attackers,
        )
        for norm in evaluation.norms
    ]
    surrogates = [*others, *checked_with]
    identity = _identity(subject, images, evaluation.attacks, evaluation) | {
        "sanity_images": evaluation.sanity_images,
        "others": [_sha256(other) for other in surrogates],
    }

    def checked() -> dict[str, Any]:
        followed = [other.network for other in surrogates]
        checks = _checks(subject, images, labels, sweeps, followed, evaluation, attackers)
        return {"checks": [asdict(check) for check in checks]}

    made = _once(_FileJournal(progress / f"{i}_checks.pt", identity), checked)
    checks = [Check(**check) for check in made["checks"]]
    log_p = reliability.log_probabilities(subject.network, images)
    sample = _nearest(subject, images, labels, sweeps, evaluation, progress / f"{i}_geometry.pt", attackers)
    predicted, smallest, compared = _first_order(sample, evaluation)
    study = _study(subject, sample, evaluation, progress / f"{i}_geometry_training.pt", attackers)
    checkpoint = subject.checkpoint
    model = Model(
        name=subject.name,
        checkpoint=str(checkpoint.path) if checkpoint.path else None,
        sha256=_sha256(subject),
        training_seed=checkpoint.config.get("seed"),
        settings=settings_hash(checkpoint.config) if checkpoint.config else None,
        epochs=checkpoint.epochs,
        seconds_per_epoch=_mean([row["seconds"] for row in checkpoint.rows if "seconds" in row]),
        wandb=checkpoint.wandb,
        data=_described(subject.datamodule, evaluation),
        verdict=verdict(checks) if checks else None,
        checks=[SanityCheck(**asdict(check)) for check in checks],
        images=len(images),
        clean_correct=sweeps[0].clean_correct,
        clean_accuracy=sweeps[0].clean_accuracy,
        threats=[_threat(swept) for swept in sweeps],
        classes=_classes(labels, sweeps, subject.datamodule.classes),
        first_order=compared,
        calibration=reliability.calibration(log_p, labels) if evaluation.reliability else None,
        noise=reliability.noise_accuracy(subject.network, images, labels, seed=evaluation.seed)
        if evaluation.reliability
        else [],
        out_of_distribution=reliability.out_of_distribution(
            subject.network, log_p, _other_images(subject.datamodule, images, evaluation)
        )
        if evaluation.reliability
        else [],
    )
    return model, _Details(
        subject.name,
        labels,
        log_p.exp().amax(-1),
        sweeps,
        predicted,
        smallest,
        study,
        subject.datamodule.pictures,
    )


def _sweep(
    subject: Subject,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    surrogates: dict[str, list[Subject]],
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> Sweep:
    """Attack one of the models in one norm."""
    attacks = [attack for attack in evaluation.attacks if attack.norm == norm]
    followed = {attack.name: surrogates[attack.name] for attack in attacks if attack.name in surrogates}
    identity = _identity(subject, images, attacks, evaluation)
    if followed:
        identity["surrogates"] = {name: [_sha256(other) for other in others] for name, others in followed.items()}
    bars = _Bars(subject.name, norm)
    try:
        return sweep(
            subject.network,
            images,
            labels,
            attacks,
            seed=evaluation.seed,
            independent=evaluation.independent,
            surrogates={name: [other.network for other in others] for name, others in followed.items()},
            progress=bars,
            journal=_FileJournal(progress, identity),
            attackers=attackers,
        )
    finally:
        bars.close()


def _identity(subject: Subject, images: Tensor, attacks: Sequence[Attack], evaluation: Evaluation) -> dict[str, Any]:
    """Return what tells a part of an evaluation from that of another."""
    return {
        "sha256": _sha256(subject),
        "attacks": {attack.name: _parameters(attack) for attack in attacks},
        "seed": evaluation.seed,
        "independent": evaluation.independent,
        "images": hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest(),
        "versions": versions(),
        "device": _device().type,  # it decides how many images are in a batch, and what is drawn
    }


def _sha256(subject: Subject) -> str:
    """Return the hash of a classifier's file or, of one without, of its weights: a function may return others next."""
    if subject.checkpoint.sha256:
        return subject.checkpoint.sha256
    state = {name: value for name, value in subject.network.state_dict().items() if isinstance(value, Tensor)}
    return hashlib.sha256(safetensors.torch.save({k: v.contiguous() for k, v in state.items()})).hexdigest()


def _checks(
    subject: Subject,
    images: Tensor,
    labels: Tensor,
    sweeps: Sequence[Sweep],
    others: Sequence[nn.Module],
    evaluation: Evaluation,
    attackers: Attackers,
) -> list[Check]:
    """Return the sanity checks of the evaluation of a model."""
    if not evaluation.sanity_images:
        return []
    training_images = None
    with contextlib.suppress(UserError):  # its files need not be on this machine, or be named
        trained_on = subject.checkpoint.datamodule()
        trained_on.setup("fit")
        training_images = trained_on.split("train").images
    of = len(checks_of([swept.norm for swept in sweeps]))
    with tqdm(total=of, desc=f"sanity checks of {subject.name}", unit="check") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        return sanity_checks(
            subject.network,
            images,
            labels,
            evaluation.attacks,
            sweeps,
            sample=evaluation.sanity_images,
            seed=evaluation.seed,
            training_images=training_images,
            others=others,
            progress=progress,
            attackers=attackers,
        )


def _nearest(
    subject: Subject,
    images: Tensor,
    labels: Tensor,
    sweeps: Sequence[Sweep],
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> simplifications.Sample | None:
    """Return the first images with the geometry there and the smallest ℓ2 perturbations known, if anything needs it."""
    asked = len(images) if evaluation.geometry_images is None else evaluation.geometry_images
    number = max(asked, evaluation.diagnostics_images if evaluation.diagnostics else 0)
    if not number:
        return None
    images, labels = images[:number], labels[:number]
    sample = _sample(subject, images, labels, f"geometry of {subject.name}", evaluation, progress, attackers)
    smallest = sample.smallest
    for swept in sweeps:
        if swept.norm == "l2":
            smallest = torch.minimum(smallest, swept.smallest[:number])
    return replace(sample, smallest=smallest)


def _sample(
    subject: Subject,
    images: Tensor,
    labels: Tensor,
    title: str,
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> simplifications.Sample:
    """Return what the geometry and FAB say of images."""
    correct = predictions(subject.network, images) == labels

    def measured() -> dict[str, Any]:
        with tqdm(total=len(images) + int(correct.sum()), desc=title, unit="image") as bar:
            predicted = first_order.radii(subject.network, images, progress=bar.update)
            nearest = first_order.smallest_perturbations(
                *(subject.network, images, labels, correct),
                seed=evaluation.seed,
                progress=bar.update,
                attackers=attackers,
            )
        return {"radii": asdict(predicted), "nearest": asdict(nearest)}

    made = _once(_FileJournal(progress, _identity(subject, images, [], evaluation)), measured)
    nearest = first_order.Nearest(**made["nearest"])
    return simplifications.Sample(images, correct, first_order.Radii(**made["radii"]), nearest, nearest.length)


def _l2_budgets(evaluation: Evaluation) -> Sequence[float]:
    """Return the ℓ2 radii that are attacked, or else the usual ones."""
    budgets = {eps for attack in evaluation.attacks if attack.norm == "l2" for eps in attack.eps if eps > 0}
    return sorted(budgets) or L2_RADII


def _first_order(
    sample: simplifications.Sample | None, evaluation: Evaluation
) -> tuple[first_order.Radii | None, Tensor | None, FirstOrder | None]:
    """Return the radii at the first images, the smallest ℓ2 perturbations known there, and the comparison."""
    number = evaluation.geometry_images
    if sample is None or number == 0:
        return None, None, None
    sample = sample if number is None else sample.first(number)
    compared = first_order.compare(sample.radii, sample.smallest, sample.correct, _l2_budgets(evaluation))
    return sample.radii, sample.smallest, compared


def _study(
    subject: Subject,
    sample: simplifications.Sample | None,
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> simplifications.Study | None:
    """Measure the note's simplifications, if they are asked for."""
    if sample is None or not evaluation.diagnostics:
        return None
    checkpoint, training, condition = subject.checkpoint, None, None
    with contextlib.suppress(UserError):  # a foreign model does not say
        condition = checkpoint.condition(subject.datamodule.classes)
    split = None
    with contextlib.suppress(UserError):  # nor what it was trained on, whose files need not be on this machine
        trained_on = checkpoint.datamodule()
        trained_on.setup("fit")
        split = trained_on.split("train")
    if split is not None:
        images, labels = (tensor.to(_device()) for tensor in split.first(evaluation.diagnostics_images))
        title = f"geometry of {subject.name}, training images"
        training = _sample(subject, images, labels, title, evaluation, progress, attackers)
    sample = sample.first(evaluation.diagnostics_images)
    total = simplifications.PASSES * len(sample.images)
    with tqdm(total=total, desc=f"simplifications of {subject.name}", unit="image") as bar:
        return simplifications.study(
            subject.name,
            subject.network,
            sample,
            training,
            budgets=_l2_budgets(evaluation),
            condition=condition,
            rows=checkpoint.rows,
            progress=bar.update,
        )


def _other_images(datamodule: ImageDataModule, images: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
    """Return images of another kind: made from the evaluated ones, and the other data set where its files are."""
    found = reliability.transformed(images, seed=evaluation.seed, pictures=datamodule.pictures)
    if not datamodule.pictures:
        what = f"the points of {datamodule.data_name} are no pictures"
        Console().print(f"left out: rotated and inverted images, {what}", soft_wrap=True)
    if not isinstance(datamodule, MNISTDataModule):
        return found
    other = MNISTDataModule if isinstance(datamodule, FashionMNISTDataModule) else FashionMNISTDataModule
    elsewhere = other(root=str(datamodule.root), validation_size=0)
    if elsewhere.present():
        elsewhere.setup("test")
        found[elsewhere.data_name] = elsewhere.split("test").first(len(images))[0].to(images)
    return found


def _threat(swept: Sweep) -> Threat:
    return Threat(
        norm=swept.norm,
        budgets=[
            Budget(
                eps=budget.eps,
                attacked=budget.attacked,
                correct=budget.correct,
                images=budget.images,
                share_of_attacked=budget.share_of_attacked,
                robust_accuracy=budget.robust_accuracy,
                attacks=[AttackOutcome(**asdict(attack)) for attack in budget.attacks],
            )
            for budget in swept.budgets
        ],
    )


def _classes(labels: Tensor, sweeps: Sequence[Sweep], classes: int) -> list[ClassAccuracy]:
    return [
        ClassAccuracy(
            label=label,
            images=int((labels == label).sum()),
            clean_correct=int((sweeps[0].predicted[labels == label] == label).sum()),
            robust_correct={
                swept.norm: [int(robust[labels == label].sum()) for robust in swept.robust] for swept in sweeps
            },
        )
        for label in range(classes)
    ]


def _mean(values: Sequence[float | int]) -> float | None:
    return sum(values) / len(values) if values else None


def _points(details: Sequence[_Details]) -> plots.Points:
    return {d.name: (d.radii.predicted, d.smallest) for d in details if d.radii and d.smallest is not None}


def _figures(
    results: Results, alike: Sequence[Group], details: Sequence[_Details], points: plots.Points
) -> dict[str, Figure]:
    """Return the figures by name, in the order in which a report shows them."""
    figures = plots.comparison(results, alike)
    if points:
        figures["first_order"] = plots.predicted_against_found(points)
    for model, detail in zip(results.models, details, strict=True):
        suffix = plots.suffix_of(model.name, len(details))
        for swept in detail.sweeps if detail.pictures else ():
            examples = {b.eps: e for b, e in zip(swept.budgets, swept.examples, strict=True)}
            title = f"{model.name}: images broken in {plots.NORMS[swept.norm]}"
            figures[f"examples_{swept.norm}{suffix}"] = plots.adversarial_examples(
                examples, norm=swept.norm, title=title
            )
        if detail.study is not None:
            figures[f"simplifications{suffix}"] = plots.six_simplifications(detail.study, split=results.split)
    return figures


def _simplified(results: Results, studies: Sequence[simplifications.Study]) -> simplifications.Simplifications | None:
    """Return what ``simplifications.json`` holds, if they were measured."""
    if not studies:
        return None
    return simplifications.Simplifications(
        split=results.split,
        seed=results.seed,
        attacks=[name for name, attack in results.attacks.items() if attack["norm"] == "l2"],
        models=[study.result for study in studies],
    )


def _image_rows(results: Results, details: Sequence[_Details]) -> Iterator[list[Any]]:
    """Return a heading, and a row for each model and image: its classes, and what it withstood."""
    columns = ["name", "image", "label", "predicted", "confidence"]
    for swept in details[0].sweeps:
        columns += [f"robust_{swept.norm}_{budget.eps:g}" for budget in swept.budgets] + [f"smallest_{swept.norm}"]
    geometry = ["delta", "boundary", "jacobian_frobenius", "jacobian_spectral", "predicted_l2", "smallest_known_l2"]
    yield columns + (geometry if details[0].radii else [])
    for detail in details:
        values: list[list[Any]] = [detail.labels.tolist(), detail.sweeps[0].predicted.tolist()]
        values.append([f"{confidence:.6g}" for confidence in detail.confidence.tolist()])
        for swept in detail.sweeps:
            values += [robust.int().tolist() for robust in swept.robust] + [_lengths(swept.smallest)]
        if detail.radii is not None and detail.smallest is not None:
            radii = detail.radii
            known = [radii.center, radii.boundary, radii.frobenius, radii.spectral, radii.predicted, detail.smallest]
            rest = [""] * (len(detail.labels) - len(detail.smallest))
            values += [_lengths(value) + rest for value in known]
        for image, row in enumerate(zip(*values, strict=True)):
            yield [detail.name, image, *row]


def _lengths(values: Tensor) -> list[str]:
    """Return numbers as text, and nothing for what is not known."""
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values.tolist()]
