"""From checkpoints to a report of what withstands an attack."""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, ListConfig
from pydantic import BaseModel, Field, PositiveInt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm import tqdm

from jacobian_robust.attacks import Attack
from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.config import build, plain, read_options
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.files import claim, from_here, write_atomically
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.plots import accuracy_curves, adversarial_examples
from jacobian_robust.provenance import versions
from jacobian_robust.robustness import Sweep, sweep
from jacobian_robust.sanity import CHECKS, Check, sanity_checks, verdict
from jacobian_robust.tracking import WandbOptions, log_evaluation, read_logger, wandb_run

__all__ = ["Evaluation", "evaluate", "read_evaluation", "report"]


class _Options(BaseModel):
    """The scalars of ``conf/evaluate.yaml``, which ``conf/train.yaml`` has too."""

    seed: int = Field(ge=0, lt=2**32)
    limit: PositiveInt | None
    split: Literal["test", "validation"]
    independent: bool
    sanity_images: int = Field(ge=0)


@dataclass(frozen=True)
class Evaluation:
    """How checkpoints are evaluated.

    Attributes:
        attack: the attack and its budgets.
        seed: of the attack.
        limit: how many of the split's first images; ``None`` for all.
        split: ``test``, or ``validation`` to choose hyper-parameters by: the images held out from training.
        independent: attack all correct images anew at each budget, as the note does.
        sanity_images: how many images the sanity checks attack anew; 0 for no checks.
        data: the data to evaluate on, instead of what each checkpoint was trained on.
    """

    attack: Attack
    seed: int
    limit: int | None
    split: Literal["test", "validation"] = "test"
    independent: bool = False
    sanity_images: int = 0
    data: MNISTDataModule | None = None


def read_evaluation(cfg: DictConfig) -> Evaluation:
    """Return the evaluation that a config asks for.

    Raises:
        UserError: if an option is at fault.
    """
    options = read_options(_Options, cfg)
    return Evaluation(build(cfg, "attack", Attack), **dict(options))


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as ``conf/evaluate.yaml`` describes, and return what ``robustness.json`` holds.

    Raises:
        UserError: if an option, a checkpoint, a data file or a directory is at fault.
    """
    keep_freed_memory()
    evaluation = read_evaluation(cfg)
    if cfg.get("data"):
        evaluation = replace(evaluation, data=build(cfg, "data", MNISTDataModule))
    places = cfg.checkpoint if isinstance(cfg.checkpoint, list | ListConfig) else [cfg.checkpoint]
    checkpoints = find_checkpoints([str(place) for place in places if place is not None])
    directory = from_here(cfg.output_dir)
    return report(
        checkpoints,
        evaluation,
        directory=directory,
        group=directory.name,
        logger=read_logger(cfg),
        config=plain(cfg),
        model=build(cfg, "model", nn.Module, optional=True),
    )


def report(
    paths: Sequence[Path],
    evaluation: Evaluation,
    *,
    directory: Path,
    logger: WandbOptions | None,
    group: str,
    config: dict[str, Any],
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Attack checkpoints, write the report into ``directory`` and print it; return what ``robustness.json`` holds.

    Args:
        paths: checkpoint files.
        evaluation: how to evaluate them.
        directory: for the results; it holds none yet.
        logger: where else to log.
        group: what the W&B run is shown under.
        config: plain containers, for the logger and ``config.yaml``.
        model: a classifier to load the weights into, instead of the one that each checkpoint names.

    Raises:
        UserError: if a checkpoint or the directory is at fault, before anything is attacked.
    """
    checkpoints = [load_checkpoint(path) for path in paths]
    networks = [checkpoint.model(model) for checkpoint in checkpoints]
    datamodules = [evaluation.data or checkpoint.datamodule() for checkpoint in checkpoints]
    for datamodule in datamodules:
        datamodule.require(evaluation.split)
        datamodule.prepare_data()
    names = _names(paths)
    claim(directory, config)
    with wandb_run(
        logger,
        directory=directory,
        group=group,
        name=f"{evaluation.attack.name}-{directory.resolve().name}",
        job_type="evaluation",
        tags=[evaluation.attack.name],
        config=config,
    ) as run:
        sweeps = [
            _sweep(network, datamodule, name, evaluation)
            for network, datamodule, name in zip(networks, datamodules, names, strict=True)
        ]
        checks = [_checks(i, networks, checkpoints, datamodules, names, sweeps, evaluation) for i in range(len(names))]
        results = _results(checkpoints, datamodules, names, sweeps, checks, evaluation)
        rows = _rows(results)
        with write_atomically(directory / "robustness.json") as file:
            json.dump(results, file, indent=2)
        with write_atomically(directory / "robustness.csv") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with write_atomically(directory / "images.csv") as file:
            csv.writer(file).writerows(_image_rows(names, datamodules, sweeps, evaluation))
        figures = {"accuracy": accuracy_curves(results["models"], norm=evaluation.attack.norm, split=evaluation.split)}
        for name, swept in zip(names, sweeps, strict=True):
            examples = {b.eps: e for b, e in zip(swept.budgets, swept.examples, strict=True)}
            suffix = f"_{name.replace('/', '_')}" if len(names) > 1 else ""
            figures[f"adversarial_examples{suffix}"] = adversarial_examples(
                examples, title=f"{name}: images that {evaluation.attack.name} broke"
            )
        for figure_name, figure in figures.items():
            figure.savefig(directory / f"{figure_name}.png", dpi=120)
        if run is not None:
            log_evaluation(run, results, rows, figures)
    console = Console()
    for line in _verdicts(results):
        console.print(line, soft_wrap=True)
    console.print(_table(results))
    console.print(
        f"results: {directory}/robustness.json, .csv, images.csv, {', '.join(f'{name}.png' for name in figures)}",
        soft_wrap=True,
    )
    return results


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct names: the run directories, less what they share from the left."""
    files = [path.resolve() for path in paths]
    in_run = ("checkpoints", "last.ckpt")
    runs = [file.parents[1] if file.parts[-2:] == in_run else file for file in files]
    if len(runs) == 1:
        return [runs[0].name]
    shared = 0
    while len({run.parts[: shared + 1] for run in runs}) == 1 and shared < min(len(run.parts) for run in runs) - 1:
        shared += 1
    return ["/".join(run.parts[shared:]) for run in runs]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sweep(network: nn.Module, datamodule: MNISTDataModule, name: str, evaluation: Evaluation) -> Sweep:
    datamodule.setup("test" if evaluation.split == "test" else "validate")
    device = _device()
    images, labels = (tensor.to(device) for tensor in datamodule.split(evaluation.split).first(evaluation.limit))
    attack = evaluation.attack
    total = len(attack.eps) * attack.restarts * len(images)
    with tqdm(total=total, desc=f"{attack.name} on {name}", unit="image") as bar:
        swept = sweep(
            network.to(device),
            images,
            labels,
            attack,
            seed=evaluation.seed,
            independent=evaluation.independent,
            progress=bar.update,
        )
        bar.update(total - bar.n)  # images that the model got wrong by itself
    return swept


def _checks(
    i: int,
    networks: Sequence[nn.Module],
    checkpoints: Sequence[Checkpoint],
    datamodules: Sequence[MNISTDataModule],
    names: Sequence[str],
    sweeps: Sequence[Sweep],
    evaluation: Evaluation,
) -> list[Check]:
    """Return the sanity checks of one of the models; the others serve to transfer examples from."""
    if not evaluation.sanity_images:
        return []
    images, labels = (t.to(_device()) for t in datamodules[i].split(evaluation.split).first(evaluation.limit))
    training_images = None
    with contextlib.suppress(UserError):  # its files need not be on this machine
        trained_on = checkpoints[i].datamodule()
        trained_on.setup("fit")
        training_images = trained_on.split("train").images
    with tqdm(total=len(CHECKS), desc=f"sanity checks of {names[i]}", unit="check") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        return sanity_checks(
            networks[i],
            images,
            labels,
            evaluation.attack,
            sweeps[i],
            sample=evaluation.sanity_images,
            seed=evaluation.seed,
            training_images=training_images,
            others=[network for other, network in enumerate(networks) if other != i],
            progress=progress,
        )


def _results(
    checkpoints: Sequence[Checkpoint],
    datamodules: Sequence[MNISTDataModule],
    names: Sequence[str],
    sweeps: Sequence[Sweep],
    checks: Sequence[Sequence[Check]],
    evaluation: Evaluation,
) -> dict[str, Any]:
    return {
        "format": 2,
        "split": evaluation.split,
        "independent": evaluation.independent,
        "attack": asdict(evaluation.attack),
        "seed": evaluation.seed,
        "device": _device().type,
        "versions": versions(),
        "models": [
            {
                "name": name,
                "checkpoint": str(checkpoint.path),
                "sha256": checkpoint.sha256,
                "epochs": checkpoint.epochs,
                "seconds_per_epoch": _mean([row["seconds"] for row in checkpoint.rows if "seconds" in row]),
                "data": f"{datamodule.dataset_class.__name__} {evaluation.split}",
                "verdict": verdict(checked) if checked else None,
                "checks": [asdict(check) for check in checked],
                "images": swept.images,
                "clean_correct": swept.clean_correct,
                "clean_accuracy": swept.clean_accuracy,
                "budgets": [
                    asdict(b) | {"share_of_attacked": b.share_of_attacked, "robust_accuracy": b.robust_accuracy}
                    for b in swept.budgets
                ],
            }
            for checkpoint, datamodule, name, swept, checked in zip(
                checkpoints, datamodules, names, sweeps, checks, strict=True
            )
        ],
    }


def _mean(values: Sequence[float | int]) -> float | None:
    return sum(values) / len(values) if values else None


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each model and budget, with everything that the figure depends on."""
    attack = {f"attack_{key}": value for key, value in results["attack"].items() if key != "eps"}
    packages = {f"version_{name}": number for name, number in results["versions"].items()}
    return [
        {
            "name": model["name"],
            "verdict": model["verdict"],
            **budget,
            "clean_correct": model["clean_correct"],
            "clean_accuracy": model["clean_accuracy"],
            **attack,
            "independent": results["independent"],
            "seed": results["seed"],
            "device": results["device"],
            "data": model["data"],
            "checkpoint": model["checkpoint"],
            "sha256": model["sha256"],
            **packages,
        }
        for model in results["models"]
        for budget in model["budgets"]
    ]


def _image_rows(
    names: Sequence[str], datamodules: Sequence[MNISTDataModule], sweeps: Sequence[Sweep], evaluation: Evaluation
) -> Iterator[list[Any]]:
    """Return a heading, and a row for each model and image: its classes, and whether it withstood each budget."""
    yield ["name", "image", "label", "predicted", *(f"robust_{eps:g}" for eps in evaluation.attack.eps)]
    for name, datamodule, swept in zip(names, datamodules, sweeps, strict=True):
        _, labels = datamodule.split(evaluation.split).first(evaluation.limit)
        columns = [labels, swept.predicted, *(robust.int() for robust in swept.robust)]
        for image, values in enumerate(torch.stack([column.cpu() for column in columns], dim=1).tolist()):
            yield [name, image, *values]


_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def _verdicts(results: dict[str, Any]) -> list[Text]:
    """Return a line for each model's verdict, and one for each of its checks that did not pass."""
    lines = []
    for model in results["models"]:
        if model["verdict"] is None:
            continue
        found = {status: [c for c in model["checks"] if c["status"] == status] for status in ("pass", "warn", "fail")}
        counts = ", ".join(f"{len(checks)} {status}" for status, checks in found.items() if checks)
        lines.append(
            Text.assemble(f"{model['name']}: sanity ", (model["verdict"], _STYLES[model["verdict"]]), f" ({counts})")
        )
        lines += [
            Text.assemble("  ", (status, _STYLES[status]), f" {check['name']}: {check['why']}")
            for status in ("fail", "warn")
            for check in found[status]
        ]
    return lines


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _table(results: dict[str, Any]) -> Table:
    attack, models = results["attack"], results["models"]
    settings = ", ".join(f"{key} {value}" for key, value in attack.items() if key not in ("name", "eps", "batch_size"))
    settings += ", budgets independent" if results["independent"] else ", an image broken once stays broken"
    table = Table(
        title=f"{attack['name']} ({settings}): accuracy on {models[0]['images']} {results['split']} images",
        caption="In brackets: the note's convention, the share of the correctly classified images that stay correct.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("clean", justify="right")
    for eps in attack["eps"]:
        table.add_column(f"ε = {eps:g}", justify="right")
    timed = [model["seconds_per_epoch"] for model in models]
    if all(timed):
        table.add_column("training s/epoch", justify="right")
    for model in models:
        cells = [f"{b['robust_accuracy']:.1%} ({_percent(b['share_of_attacked'])})" for b in model["budgets"]]
        if all(timed):
            cost = model["seconds_per_epoch"] / timed[0]
            cells.append(
                f"{model['seconds_per_epoch']:.0f} (×{cost:.2f})" if model is not models[0] else f"{timed[0]:.0f}"
            )
        table.add_row(model["name"], f"{model['clean_accuracy']:.1%}", *cells)
    return table
