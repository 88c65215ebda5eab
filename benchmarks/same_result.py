"""Whether a cheaper norm changes what the training gives: ``python benchmarks/same_result.py``.

One architecture, trained by ``train.py``'s own function with the same seeds, images and steps, with the exact Frobenius
norm, with probes, with amortisation, with the classic random projection, and without a penalty; then attacked on
*held-out training images*, so that a default may be chosen by the result. Runs that are already in the directory are
not run again: the work may be interrupted, and shared between processes (each with other ``--seeds``).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rich import box
from rich.console import Console
from rich.table import Table
from step_cost import projected
from torch import Tensor

from jacobian_robust.errors import UserError
from jacobian_robust.penalties import Frobenius
from jacobian_robust.training.train import train

WAYS = {
    "exact": ["regularizer.probes=null"],
    "2 probes": ["regularizer.probes=2"],
    "1 probe": ["regularizer.probes=1"],
    "1 probe, every 2nd step": ["regularizer.probes=1", "amortization.every=2"],
    "1 projection": ["regularizer._target_=__main__.ProjectedFrobenius"],
    "no penalty": ["regularizer=none"],
}
MEASURES = {
    "accuracy": "clean, %",
    "0.1": "PGD-40 ε 0.1, %",
    "0.2": "PGD-40 ε 0.2, %",
    "jacobian_norm": "mean ‖J_μ‖_F",
}
RESULT = "result.json"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class ProjectedFrobenius(Frobenius):
    """Eq. 15 with the norm that one direction, uniform on the sphere, estimates: the classic random projection.

    It is Hoffman, Roberts & Yaida's ("Robust learning with Jacobian regularization", 2019), on the rows of ``J_μ``.
    """

    def norm(self, logits: Tensor, inputs: Tensor, *, generator: torch.Generator | None, create_graph: bool) -> Tensor:
        """Return an estimate of ``‖J_μ‖_F`` whose square has the right mean."""
        return logits.shape[-1] ** 0.5 * projected(logits, inputs, create_graph=create_graph, generator=generator)


def run(way: str, seed: int, directory: Path, *, epochs: int, steps: int, images: int) -> None:
    """Train and attack one network; that the training diverged is a result too."""
    overrides = [
        *WAYS[way],
        f"seed={seed}",
        f"trainer.max_epochs={epochs}",
        f"trainer.limit_train_batches={steps}",
        "evaluate=true",
        "split=validation",
        "independent=true",
        "sanity_images=0",
        "geometry_images=0",
        "reliability=false",
        f"limit={images}",
        "attack.pgd_linf.eps=[0.1,0.2]",
        "logger=csv",
        f"output_dir={directory.resolve()}",
    ]
    with initialize_config_dir(str(Path(__file__).parents[1].resolve() / "conf"), version_base="1.3"):
        cfg = compose("train", overrides)
    try:
        metrics = train(cfg)
    except UserError as error:
        if "diverged" not in str(error):
            raise
        (directory / RESULT).write_text(json.dumps({"diverged": str(error)}, indent=2))
        return
    measures = {eps: 100 * metrics[f"robust_accuracy_linf_{eps}"] for eps in ("0.1", "0.2")}
    measures |= {
        "accuracy": 100 * metrics["validation_accuracy"],
        "jacobian_norm": metrics["validation_jacobian_norm"],
    }
    (directory / RESULT).write_text(json.dumps(measures, indent=2))


def place(directory: Path, way: str, seed: int) -> Path:
    return directory / way.replace(",", "").replace(" ", "_") / f"seed{seed}"


def gather(directory: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the measures of all finished runs in a directory, by way and seed."""
    gathered: dict[str, dict[str, dict[str, float]]] = {}
    for way in WAYS:
        for path in sorted(place(directory, way, 0).parent.glob(f"seed*/{RESULT}")):
            gathered.setdefault(way, {})[path.parent.name.removeprefix("seed")] = json.loads(path.read_text())
    return gathered


def summarise(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def tables(results: dict[str, dict[str, dict[str, float]]]) -> tuple[Table, Table]:
    """Return mean ± standard deviation over the seeds for each way; and the same of the differences from exact."""
    measured = Table(*("", "seeds", "diverged", *MEASURES.values()), box=box.MARKDOWN)
    differences = Table(*("less exact, seed by seed", "seeds", *MEASURES.values()), box=box.MARKDOWN)
    finished = {
        way: {seed: measures for seed, measures in by_seed.items() if "diverged" not in measures}
        for way, by_seed in results.items()
    }
    exact = finished.get("exact", {})
    for way, by_seed in finished.items():
        cells = [summarise([measures[name] for measures in by_seed.values()]) for name in MEASURES]
        measured.add_row(way, str(len(results[way])), str(len(results[way]) - len(by_seed)), *cells)
        if way != "exact":
            paired = [seed for seed in by_seed if seed in exact]
            cells = [summarise([by_seed[seed][name] - exact[seed][name] for seed in paired]) for name in MEASURES]
            differences.add_row(way, str(len(paired)), *cells)
    return measured, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only print what is there")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000, help="of an epoch, of 32 images each")
    parser.add_argument("--images", type=int, default=1000, help="to attack")
    parser.add_argument("--directory", type=Path, default=Path("runs/same_result"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for way in arguments.ways:
            directory = place(arguments.directory, way, seed)
            if (directory / RESULT).exists():
                continue
            try:
                run(way, seed, directory, epochs=arguments.epochs, steps=arguments.steps, images=arguments.images)
            except UserError as error:
                sys.exit(f"error: {error}")
    results = gather(arguments.directory)
    console = Console(width=140)
    for table in tables(results):
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
