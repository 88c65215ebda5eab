"""Evaluate classifiers under attack: from checkpoints to a report."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.config import build, check, plain, read_options
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import Classifier, device, load_classifiers, weights_hash
from jacobian_robust.evaluation.journal import PROGRESS
from jacobian_robust.evaluation.measure import Room, measure
from jacobian_robust.evaluation.options import (
    EVALUATION_GROUPS,
    EVALUATION_OPTIONS,
    Evaluation,
    Places,
    read_evaluation,
    read_pixels,
)
from jacobian_robust.evaluation.transfer import stand_in, transferable
from jacobian_robust.files import claimed, from_here, write_atomically
from jacobian_robust.geometry.families import Family
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.provenance import run_url
from jacobian_robust.reporting.console import print_results
from jacobian_robust.reporting.evaluation import write_evaluation
from jacobian_robust.reporting.wandb import WandbOptions, full_id, log_evaluation, read_logger, wandb_run
from jacobian_robust.robustness.results import Details, results_of
from jacobian_robust.robustness.schema import Model, Results, groups
from jacobian_robust.robustness.workers import full_precision, several

__all__ = ["evaluate", "report"]


def evaluate(cfg: DictConfig) -> Results:
    """Evaluate as ``conf/evaluate.yaml`` describes, and return what ``robustness.json`` holds.

    Raises:
        UserError: if an option, a checkpoint, a data file or a directory is at fault.
    """
    keep_freed_memory()
    check(
        cfg,
        {*EVALUATION_OPTIONS, *Places.model_fields, "input"},
        (*EVALUATION_GROUPS, "logger", "data", "model", "task"),
    )
    options = read_options(Places, cfg)
    evaluation = read_evaluation(cfg)
    if cfg.get("data"):
        evaluation = replace(evaluation, data=build(cfg, "data", ImageDataModule))
    evaluation = replace(evaluation, family=build(cfg, "task", Family, optional=True))
    network = build(cfg, "model", nn.Module, optional=True)
    named = options.checkpoint if isinstance(options.checkpoint, list) else [options.checkpoint or ""]
    named = [place for place in named if place]
    if named or network is None:
        checkpoints = [load_checkpoint(path, trust=options.trust) for path in find_checkpoints(named)]
    else:
        checkpoints = [Checkpoint(None, None)]
    directory = from_here(options.output_dir)
    pixels = read_pixels(cfg)
    named_models = load_classifiers(checkpoints, evaluation, network=network, pixels=pixels)
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


def report(
    models: Sequence[Classifier],
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
    evaluation, sources = transferable(
        evaluation.for_family(models[0].datamodule.family),
        models[0].datamodule,
        len(models),
        trust=trust,
        network=network,
        pixels=pixels,
    )
    checked_with = list(itertools.chain(*sources.values())) or stand_in(models, evaluation, trust=trust)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(directory, config, resume=resume))
        finished = directory / "robustness.json"
        if finished.is_file():
            results = _finished(finished, models)
            Console().print(f"evaluated already → {finished}", soft_wrap=True)
            return results
        run = stack.enter_context(_wandb_run(models, evaluation, logger, directory, group, config))
        followed = [classifier.network for classifier in (*models, *checked_with)]
        with full_precision(), several(evaluation.processes, followed) as attackers:
            room = Room(models, evaluation, sources, checked_with, directory / PROGRESS, attackers)
            measured = [measure(room, i) for i in range(len(models))]
        results, diagnosed = _write(measured, evaluation, directory, run, config)
        with write_atomically(finished) as file:  # last: it says that the evaluation is whole
            file.write(results.model_dump_json(indent=2))
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    print_results(results, groups(results.models))
    if evaluation.diagnostics is not None:
        evaluation.diagnostics.print(diagnosed, results)
    Console().print(f"results: {directory}/report.html, robustness.json, .csv, images.csv, *.png", soft_wrap=True)
    Console().print(f"in one picture: {directory}/overview_{results.norms[0]}.png", soft_wrap=True)
    return results


def _write(
    measured: Sequence[tuple[Model, Details, Any]],
    evaluation: Evaluation,
    directory: Path,
    run: Any,
    config: dict[str, Any],
) -> tuple[Results, list[Any]]:
    """Write all files but ``robustness.json``, and the W&B run; return the results and the diagnostics'."""
    results = results_of(
        [model for model, _, _ in measured],
        evaluation.attacks,
        evaluation.certificates,
        seed=evaluation.seed,
        device=device().type,
        split=evaluation.split,
        independent=evaluation.independent,
    )
    alike, diagnostics = groups(results.models), evaluation.diagnostics
    diagnosed = [found for _, _, found in measured]
    if diagnostics is not None:
        diagnostics.write(diagnosed, results, directory)
    written = write_evaluation(
        results,
        alike,
        [details for _, details, _ in measured],
        directory,
        config=config,
        figures=diagnostics.figures(diagnosed, results) if diagnostics else None,
        section=diagnostics.section(diagnosed, results) if diagnostics else None,
    )
    if run is not None:
        report_file = directory / "report.html"
        log_evaluation(run, results, alike, written.rows, written.points, written.figures, report_file)
    return results, diagnosed


@contextlib.contextmanager
def _wandb_run(
    models: Sequence[Classifier],
    evaluation: Evaluation,
    logger: WandbOptions | None,
    directory: Path,
    group: str,
    config: dict[str, Any],
) -> Iterator[Any]:
    """Yield the W&B run of an evaluation, resumed if it was interrupted; ``None`` without W&B."""
    names = "+".join(attack.name for attack in evaluation.attacks)
    trained = {classifier.name: classifier.checkpoint.wandb for classifier in models if classifier.checkpoint.wandb}
    identity = directory / PROGRESS / "wandb_run"
    with wandb_run(
        logger,
        directory=directory,
        group=group,
        name=f"{names}-{directory.resolve().name}"[:128],
        job_type="evaluation",
        tags=[attack.name for attack in evaluation.attacks],
        config=config | {"training_runs": trained},
        notes="".join(f"{name} was trained in run {run_url(of) or of}.\n" for name, of in trained.items()),
        resumed=identity.read_text() if identity.is_file() else None,
    ) as run:
        if run is not None:
            identity.parent.mkdir(exist_ok=True)
            with write_atomically(identity) as file:
                file.write(full_id(run))
        yield run


def _finished(file: Path, models: Sequence[Classifier]) -> Results:
    """Return a finished evaluation of these models.

    Raises:
        UserError: if it cannot be read, or is of other weights: the same options can name another file's by now.
    """
    try:
        results = Results.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"{file} is damaged, or of another version: choose another hydra.run.dir") from error
    if [model.sha256 for model in results.models] != [weights_hash(classifier) for classifier in models]:
        raise UserError(
            f"{file} is the evaluation of other weights than those that are there now: to evaluate these, choose "
            "another hydra.run.dir"
        )
    return results
