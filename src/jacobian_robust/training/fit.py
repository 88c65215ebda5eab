"""One run trained, and the files that tell of it."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from jacobian_robust.checkpoints import export, load_checkpoint
from jacobian_robust.config import plain
from jacobian_robust.errors import Terminated, UserError, describe
from jacobian_robust.files import from_here, write_atomically
from jacobian_robust.memory import rare_garbage_collection
from jacobian_robust.provenance import git_state, versions
from jacobian_robust.reporting.figures import training_curves
from jacobian_robust.reporting.wandb import WandbOptions, full_id, log_training, wandb_run
from jacobian_robust.training.build import Run
from jacobian_robust.training.checks import UNUSED
from jacobian_robust.training.cost import measure_cost
from jacobian_robust.training.datamodule import LightningImages
from jacobian_robust.training.options import METRICS, Options
from jacobian_robust.training.quiet import quiet

Rows = list[dict[str, float | int]]


def fit(
    run: Run, logger: WandbOptions | None, options: Options, twin: Rows | None, group: str
) -> dict[str, float | int]:
    """Train, and write the files that tell of it; ``twin`` are the epochs of the undefended twin."""
    console = Console()
    console.print(f"[bold]{run.name}[/bold]: {run.trainer.max_epochs} epochs → {run.directory}")
    config = plain(run.cfg)
    tags = [run.name, run.datamodule.data_name, type(run.module.model).__name__]
    pl.seed_everything(options.seed, workers=True, verbose=False)
    started = time.perf_counter()
    with wandb_run(
        logger,
        directory=run.directory,
        group=group,
        name=f"{run.name}-{_job()}seed{options.seed}",
        job_type="train",
        tags=tags,
        config=config,
        resumed=load_checkpoint(run.checkpoint).wandb if options.resume and run.checkpoint else None,
    ) as wandb:
        if wandb is not None:
            run.trainer.logger = WandbLogger(experiment=wandb)
            run.module.wandb = full_id(wandb)
        fit_alone(run, options)
        seconds = time.perf_counter() - started
        cost = measure_cost(run, seconds)
        metrics = run.record.rows[-1]
        if pruned := run.pruning is not None and run.pruning.pruned:
            console.print(f"{run.name}: the search ends this trial after {len(run.record.rows)} epochs")
        figure = training_curves(
            run.record.rows,
            twin=twin,
            penalised=run.module.penalty is not None,
            validation_name=run.datamodule.validation_name,
        )
        figure.savefig(run.directory / "curves.png", dpi=120)
        summary = {
            "name": run.name,
            "seed": options.seed,
            "metrics": metrics,
            "pruned": pruned,
            "epochs": len(run.record.rows),
            "steps": run.trainer.global_step,
            "seconds": round(seconds, 1),
            "cost": asdict(cost) if cost is not None else None,
            "parameters": sum(parameter.numel() for parameter in run.module.model.parameters()),
            "checkpoint": "checkpoints/last.ckpt",
            "wandb": run.module.wandb,
            "versions": versions(),
            **git_state(),
        }
        with write_atomically(run.directory / "summary.json") as file:
            json.dump(summary, file, indent=2)
        export(load_checkpoint(run.last_checkpoint), run.directory / "model.safetensors")
        if wandb is not None:
            log_training(wandb, run.directory / "curves.png", summary, run.record.rows, twin)
    console.print(_closing_table(run, metrics, seconds))
    if cost is not None:
        console.print(
            f"cost: {cost.plain_step_equivalents:.0f} steps by cross-entropy alone; one of the training's own takes "
            f"{cost.step_ratio:.2f} times as long on this machine",
            soft_wrap=True,
        )
    console.print(
        f"results: {run.directory}/checkpoints/last.ckpt, model.safetensors, metrics.csv, curves.png, summary.json",
        soft_wrap=True,
    )
    return dict(metrics) | ({"pruned": True} if pruned else {})


def fit_alone(run: Run, options: Options) -> None:
    """Train, and do nothing else."""
    try:
        with quiet(), rare_garbage_collection():
            run.trainer.fit(
                run.module, datamodule=LightningImages(run.datamodule), ckpt_path=run.checkpoint, weights_only=True
            )
    except MisconfigurationException as error:
        raise UserError(describe(error, "trainer")) from error
    except RuntimeError as error:
        # In torch's words, and in Lightning's: a layer that is left out now and then.
        if not re.search("finished reduction in the prior iteration|not used in producing the loss", str(error)):
            raise
        raise UserError(f"model: {UNUSED.format(name='one of its weights')}") from error
    except SystemExit:  # Lightning's answer to an interruption
        raise KeyboardInterrupt(_how_to_go_on(run, options)) from None
    except Terminated:
        raise Terminated(_how_to_go_on(run, options)) from None


def _how_to_go_on(run: Run, options: Options) -> str:
    if not run.last_checkpoint.is_file():
        return "there is no checkpoint yet"
    return f"go on with the same options, hydra.run.dir={from_here(options.output_dir)} and resume=true"


def group(options: Options) -> str:
    """Return the name of the directory that a sweep's runs, or a run, its twin and its evaluation, share."""
    directory = Path(options.output_dir).resolve()
    return (directory.parent if _job() else directory).name


def _job() -> str:
    """Return the number of a sweep's job, for its name in W&B; nothing outside a sweep."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return f"{HydraConfig.get().job.num}-" if in_sweep else ""


def _closing_table(run: Run, metrics: Mapping[str, float | int], seconds: float) -> Table:
    table = Table(title=f"{run.name}: {len(run.record.rows)} epochs, {seconds:.0f} s", title_justify="left")
    table.add_column("")
    validation_name = run.datamodule.validation_name
    table.add_column("training", justify="right")
    table.add_column(validation_name, justify="right")
    for metric in METRICS:
        cells = [metrics.get(f"{stage}_{metric}") for stage in ("train", "validation")]
        if any(cell is not None for cell in cells):
            table.add_row(metric.replace("_", " "), *("–" if cell is None else f"{cell:.4f}" for cell in cells))
    return table
