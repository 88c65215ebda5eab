"""What a penalised training step costs, as a ratio to the plain one: ``python benchmarks/step_cost.py``.

All ways take turns in one process, on a LeNet that was trained with the penalty, with a batch of 32 images and a
learning rate of zero, so that all meet the same network; ratios are of medians. Then: the error of the estimates,
memory, and how the cost grows with classes, batch and image size. The peer ``jacobian_regularizer`` (J. Hoffman,
D. A. Roberts, S. Yaida, "Robust learning with Jacobian regularization", 2019) joins if it is installed, or given by
``--jacobian-regularizer DIRECTORY_OF_ITS_REPOSITORY``.
"""

import argparse
import copy
import functools
import importlib
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet18

from jacobian_robust.checkpoints import find_checkpoints, load_checkpoint
from jacobian_robust.data import ImageDataModule, MNISTDataModule
from jacobian_robust.jacobian import FisherFactor, frobenius_norm, random_signs, spectral_norm, tangent_directions
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Amortization, Frobenius, Penalty, Spectral
from jacobian_robust.reporting.figures import PALETTE, line_style, name_points, write_picture
from jacobian_robust.training.capture import CapturedSteps
from jacobian_robust.training.module import RobustClassifier

ETA = 0.004
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = Callable[[], None]
"""One training step."""


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@dataclass
class Case:
    """A network and a batch that it is trained with."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    classes: int = 10


def random_case(classes: int = 10, batch: int = 32, size: int = 28) -> Case:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.rand(batch, 1, size, size, generator=generator).to(DEVICE)
    labels = torch.randint(0, classes, (batch,), generator=generator).to(DEVICE)
    return Case(LeNet(classes=classes, image_size=size).to(DEVICE), images, labels, classes)


def ours(
    case: Case, penalty: Penalty | None, amortization: Amortization | None = None, *, cuda_graph: bool = False
) -> Step:
    """The framework's own step: its loss, its backward pass."""
    amortization = amortization or Amortization()
    module = RobustClassifier(copy.deepcopy(case.model), sgd, penalty, amortization=amortization)
    module.eta = ETA
    if cuda_graph:
        module.captured = CapturedSteps(list(module.parameters()), module._generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    steps = itertools.count()
    batch, penalised = (case.images, case.labels), amortization.samples(len(case.labels))

    def step() -> None:
        weight = amortization.weight(next(steps))
        terms = module._captured_terms(batch, weight, penalised) or module.loss_terms(
            batch, generator=module._generator, weight=weight, penalised=penalised
        )
        optimizer.zero_grad()
        module.backward(terms.loss)
        optimizer.step()

    return step


def theirs(case: Case, penalty: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Step:
    """A plain loop around a scalar penalty of model, images and logits, with torch's own derivatives."""
    model = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        images = case.images.clone().requires_grad_()
        logits = model(images)
        cross_entropy = nn.functional.cross_entropy(logits, case.labels)
        loss = (1 - ETA) * cross_entropy + ETA * penalty(model, images, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def row_loop(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """The exact squared norm from the C rows √θ_y ∇ log θ_y, one after the other."""
    log_p = logits.log_softmax(-1)
    squares = []
    for k in range(logits.shape[-1]):
        (row,) = torch.autograd.grad(log_p[:, k].sum(), images, create_graph=True)
        squares.append(log_p[:, k].exp() * row.flatten(1).square().sum(-1))
    return torch.stack(squares).sum(0).sqrt().exp().mean()


def classic_projection(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """The norm from one direction, uniform on the sphere, over the rows of J_μ."""
    return (logits.shape[-1] ** 0.5 * projected(logits, images, create_graph=True)).exp().mean()


def projected(
    logits: Tensor, images: Tensor, *, create_graph: bool, generator: torch.Generator | None = None
) -> Tensor:
    """The length of one direction, uniform on the sphere, pulled back through the rows of J_μ."""
    v = nn.functional.normalize(torch.randn(logits.shape, generator=generator), dim=-1).to(logits.device)
    log_theta = logits.log_softmax(-1)  # the root of a softmax has no gradient where it underflows
    rooted = (log_theta / 2).exp() * v
    back = rooted - log_theta.exp() * rooted.sum(-1, keepdim=True)
    (row,) = torch.autograd.grad(logits, images, back, create_graph=create_graph, retain_graph=True)
    return row.flatten(1).norm(dim=-1)


def functional_jacobian(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """The exact norm by ``torch.func.jacrev`` of 2√softmax, one sample at a time under vmap."""

    def embedded(image: Tensor) -> Tensor:
        return 2 * torch.func.functional_call(model, parameters, image[None])[0].softmax(-1).sqrt()

    parameters: dict[str, Tensor] = dict(model.named_parameters())
    jacobian = torch.func.vmap(torch.func.jacrev(embedded))(images)
    return jacobian.flatten(1).norm(dim=-1).exp().mean()


def jacobian_regularizer(directory: Path | None, n: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor] | None:
    if directory is not None:
        sys.path.insert(0, str(directory))
    try:
        regularizer: Any = importlib.import_module("jacobian").JacobianReg(n=n)
    except ImportError:
        return None
    return lambda model, images, logits: regularizer(images, logits)


def frobenius(probes: int | None) -> Frobenius:
    return Frobenius(delta_over_eps=1e-3, probes=probes)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(ways: dict[str, tuple[Step, int]], seconds: float) -> dict[str, float]:
    """Return milliseconds a step of each way; a turn is as many steps as the way names."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken[next(iter(ways))]) < 6:
        for name, (step, steps) in ways.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            taken[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


def compare(case: Case, seconds: float, peer: Path | None) -> dict[str, dict[str, float]]:
    exact_spectral = Spectral(delta_over_eps=1e-3)
    ways = {
        "plain": (ours(case, None), 4),
        "exact Frobenius": (ours(case, frobenius(None)), 1),
        "1 probe": (ours(case, frobenius(1)), 4),
        "2 probes": (ours(case, frobenius(2)), 2),
        "3 probes": (ours(case, frobenius(3)), 2),
        "1 probe, every 2nd step": (ours(case, frobenius(1), Amortization(every=2)), 4),
        "1 probe, every 4th step": (ours(case, frobenius(1), Amortization(every=4)), 4),
        "1 probe, half of the batch": (ours(case, frobenius(1), Amortization(fraction=0.5)), 4),
        "exact spectral": (ours(case, exact_spectral), 1),
        "spectral, 1 column": (ours(case, Spectral(delta_over_eps=1e-3, columns=1)), 2),
        "spectral, 2 columns": (ours(case, Spectral(delta_over_eps=1e-3, columns=2)), 2),
        "spectral, 3 columns": (ours(case, Spectral(delta_over_eps=1e-3, columns=3)), 2),
        "spectral, 1 column, to 2%": (ours(case, Spectral(delta_over_eps=1e-3, columns=1, tolerance=0.02)), 1),
        "1 projection": (theirs(case, classic_projection), 4),
        "loop of rows, torch's derivatives": (theirs(case, row_loop), 1),
        "torch.func.jacrev": (theirs(case, functional_jacobian), 1),
    }
    if DEVICE.type == "cuda":
        for name, penalty in (("plain", None), ("exact Frobenius", frobenius(None)), ("1 probe", frobenius(1))):
            ways[f"{name}, CUDA graph"] = (ours(case, penalty, cuda_graph=True), 4)
    for n, name in ((-1, "jacobian_regularizer, exact"), (1, "jacobian_regularizer, 1 projection")):
        if theirs_penalty := jacobian_regularizer(peer, n):
            ways[name] = (theirs(case, theirs_penalty), 1 if n < 0 else 4)
    times = take_turns(ways, seconds)
    return {name: {"ms": ms, "ratio": ms / times["plain"]} for name, ms in times.items()}


def regularised(checkpoint: str | None, steps: int) -> Case:
    """Return a network that was trained with the penalty, and 200 images that it was not trained on."""
    datamodule: ImageDataModule = MNISTDataModule()
    if checkpoint is not None:
        stored = load_checkpoint(find_checkpoints([checkpoint])[0])
        model, datamodule = stored.model(), stored.datamodule()
        datamodule.setup()
    else:
        datamodule.setup("fit")
        torch.manual_seed(0)
        module = RobustClassifier(LeNet(), sgd, frobenius(2))
        optimizer = sgd(module.parameters())
        batches = itertools.islice(
            itertools.chain.from_iterable(map(iter, [datamodule.train_dataloader()] * 99)), steps
        )
        for module.eta, batch in zip(torch.linspace(0.002, 0.006, steps).tolist(), batches, strict=False):
            optimizer.zero_grad()
            module.backward(module.loss_terms(batch, generator=module._generator).loss)
            optimizer.step()
        model = module.model.eval()
    images, labels = datamodule.split("validation" if datamodule.validation_size else "test").first(200)
    return Case(model.to(DEVICE), images.to(DEVICE), labels.to(DEVICE))


def errors(case: Case, draws: int = 200) -> dict[str, dict[str, float]]:
    """Return, for each estimate, what the literature and this project measure errors by, as means over the images."""
    inputs = case.images.clone().requires_grad_()
    logits = case.model(inputs)
    exact = frobenius_norm(logits, inputs)
    found = {}

    def record(name: str, estimate: Callable[[], Tensor]) -> None:
        ratios = torch.stack([(estimate() / exact).square() for _ in range(draws)])
        found[name] = {
            "relative_variance": ratios.var(0).mean().item(),
            "bias_of_square": ratios.mean().item() - 1,
            "standard_error": (ratios.var(0) / draws).sum().sqrt().item() / len(inputs),
            "bias_of_norm": ratios.sqrt().mean().item() - 1,
        }

    generator = torch.Generator().manual_seed(0)
    rows = [torch.autograd.grad(logits[:, k].sum(), inputs, retain_graph=True)[0] for k in range(logits.shape[-1])]
    of_logits = torch.stack(rows).square().sum((0, 2, 3, 4)).sqrt()

    def projected_logits() -> Tensor:
        """A projection of the logits' Jacobian, as of `jacobian_regularizer`, for a norm of another matrix."""
        v = nn.functional.normalize(torch.randn(logits.shape), dim=-1).to(logits.device)
        (row,) = torch.autograd.grad(logits, inputs, v, retain_graph=True)
        return logits.shape[-1] ** 0.5 * row.flatten(1).norm(dim=-1) / of_logits * exact

    record("projection of the logits' Jacobian", projected_logits)
    record("classic projection", lambda: logits.shape[-1] ** 0.5 * projected(logits, inputs, create_graph=False))
    for probes in (1, 2, 3):
        probed = functools.partial(frobenius_norm, logits, inputs, probes=probes, generator=generator)
        record(f"{probes} probe{'s' * (probes > 1)}", probed)
    top = spectral_norm(logits, inputs)
    for columns, tolerance in ((1, None), (2, None), (3, None), (1, 0.02)):
        found_norm = spectral_norm(logits, inputs, columns=columns, tolerance=tolerance)
        name = f"spectral, {columns} column{'s' * (columns > 1)}{', to 2%' * (tolerance is not None)}"
        short = 1 - found_norm / top
        found[name] = {"mean_error": short.mean().item(), "largest_error": short.max().item()}
    return found


def peak_memory(step: Step) -> int:
    """Return the most bytes that a step held at once, above what it began with."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


def growth(seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds a step by what grows, its value, and the way."""
    axes: dict[str, list[Case]] = {
        "classes": [random_case(classes=c) for c in (2, 10, 100, 1000)],
        "batch": [random_case(batch=b) for b in (8, 32, 128)],
        "image size": [random_case(size=s) for s in (14, 28, 56)],
    }
    grown: dict[str, dict[str, dict[str, float]]] = {}
    for axis, cases in axes.items():
        for case in cases:
            value = {"classes": case.classes, "batch": len(case.labels), "image size": case.images.shape[-1]}[axis]
            ways = {"plain": (ours(case, None), 2), "1 probe": (ours(case, frobenius(1)), 1)}
            ways["2 probes"] = (ours(case, frobenius(2)), 1)
            if case.classes <= 100:
                ways["exact Frobenius"] = (ours(case, frobenius(None)), 1)
            grown.setdefault(axis, {})[str(value)] = take_turns(ways, seconds)
    return grown


def factor_share() -> dict[str, float]:
    """Return what factor and probe cost for 1,000 classes, beside a ResNet-18's plain step, both with batches of 32."""
    torch.manual_seed(0)
    model = resnet18().to(DEVICE)
    optimizer = sgd(model.parameters())
    images, labels = torch.rand(32, 3, 224, 224, device=DEVICE), torch.randint(0, 1000, (32,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    logits = torch.randn(32, 1000, device=DEVICE, requires_grad=True)

    def factor() -> None:
        (direction,) = tangent_directions(logits, 0, random_signs(32, 1000, device=DEVICE))
        (FisherFactor(logits) @ direction).square().sum().backward()

    def time_of(what: Step, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            what()
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    resnet_ms, factor_ms = time_of(step, 3), time_of(factor, 20)
    return {"resnet18_ms": resnet_ms, "factor_ms": factor_ms, "ratio": factor_ms / resnet_ms}


DRAWN = {
    "exact Frobenius": None,
    "exact spectral": None,
    "loop of rows, torch's derivatives": None,
    "torch.func.jacrev": None,
    "jacobian_regularizer, exact": None,
    "jacobian_regularizer, 1 projection": "projection of the logits' Jacobian",
    "1 probe": "1 probe",
    "2 probes": "2 probes",
    "3 probes": "3 probes",
    "1 probe, every 2nd step": "1 probe",
    "1 probe, every 4th step": "1 probe",
    "1 probe, half of the batch": "1 probe",
    "1 projection": "classic projection",
    "spectral, 1 column": "spectral, 1 column",
    "spectral, 2 columns": "spectral, 2 columns",
    "spectral, 3 columns": "spectral, 3 columns",
    "spectral, 1 column, to 2%": "spectral, 1 column, to 2%",
}
"""Ways to compute a norm, and whose error is theirs; none of an exact one."""

LOWEST = 1e-5
"""Error that is drawn for the exact ways."""


def error_against_cost(results: dict[str, Any]) -> Figure:
    """Return the typical relative error of a sample's norm against the cost of a step, for every way that has one."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    frobenius_colour, spectral_colour = PALETTE[:2]
    points = []
    for way, measured in DRAWN.items():
        if way not in results["steps"]:
            continue
        error = results["errors"][measured] if measured else {"relative_variance": 0.0}
        # The standard deviation of the square is twice that of the norm.
        size = error["mean_error"] if "mean_error" in error else error["relative_variance"] ** 0.5 / 2
        colour = spectral_colour if "spectral" in way else frobenius_colour
        points.append((results["steps"][way]["ratio"], max(size, LOWEST), way, colour))
    points.sort()
    for cost, size, _, colour in points:
        axes.plot(cost, size, "s" if colour == spectral_colour else "o", color=colour)
    axes.plot([], [], "o", color=frobenius_colour, label="Frobenius norm: standard deviation")
    axes.plot([], [], "s", color=spectral_colour, label="spectral norm: mean shortfall")
    ticks = [1, 1.5, 2, 3, 4, 6, 8, 12, 20]
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(1, 25),
        ylim=(LOWEST / 5, 5),
        xlabel="training step / plain step",
        ylabel="relative error of a sample's norm",
    )
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([LOWEST, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["exact", *(f"{10.0**power:g}" for power in range(-4, 1))])
    axes.minorticks_off()
    axes.set_title("Error against cost, LeNet trained with the penalty")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper right", framealpha=1)
    name_points(figure, axes, points)
    return figure


LABELS = {"plain": "plain step", "exact Frobenius": "exact norm"}


def growth_of_cost(results: dict[str, Any]) -> Figure:
    """Return how the cost of a step grows, in milliseconds, one panel for each thing that grows."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(results["growth"]), sharey=True)
    for axes, (axis, by_value) in zip(panels, results["growth"].items(), strict=True):
        names = list(dict.fromkeys(name for times in by_value.values() for name in times))
        for i, name in enumerate(names):
            points = [(float(value), times[name]) for value, times in by_value.items() if name in times]
            axes.loglog(*zip(*points, strict=True), **line_style(i))
            if axes is panels[-1]:  # beside the ends of the lines, whose order is the same in all panels
                place = {"xytext": (14, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
                axes.annotate(LABELS.get(name, name), points[-1], color=line_style(i)["color"], **place)
        axes.set(xlabel=axis, title=f"LeNet, by {axis}" + " size" * (axis == "batch"))
        axes.set_xticks([float(value) for value in by_value], list(by_value))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training step, ms")
    return figure


def print_tables(results: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"A training step, trained LeNet, batch 32, {results['machine']}", title_justify="left")
    for column in ("", "ms", "/ plain", "memory / plain"):
        table.add_column(column, justify="right" if column else "left")
    for name, r in results["steps"].items():
        memory = results["memory"].get(name)
        table.add_row(name, f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{memory:.2f}" if memory else "")
    console.print(table)
    table = Table(title="Error on a network trained with the penalty, 200 images", title_justify="left")
    for column in ("", "relative variance of the square", "bias of the square", "bias of the norm"):
        table.add_column(column, justify="right" if column else "left")
    for name, e in results["errors"].items():
        if "relative_variance" in e:
            bias = f"{e['bias_of_square']:+.4f} ± {e['standard_error']:.4f}"
            table.add_row(name, f"{e['relative_variance']:.4f}", bias, f"{e['bias_of_norm']:+.4f}")
        else:
            table.add_row(name, "", "", f"-{e['mean_error']:.4f}, at most -{e['largest_error']:.4f}")
    console.print(table)
    for axis, by_value in results["growth"].items():
        table = Table(title=f"ms a step, by {axis}", title_justify="left")
        table.add_column(axis)
        names = list(dict.fromkeys(name for times in by_value.values() for name in times))
        for name in names:
            table.add_column(name, justify="right")
        for value, times in by_value.items():
            cells = (f"{times[n]:.1f} (×{times[n] / times['plain']:.2f})" if n in times else "" for n in names)
            table.add_row(value, *cells)
        console.print(table)
    share = results["factor"]
    console.print(
        f"factor and probe for 1,000 classes: {share['factor_ms']:.2f} ms, {share['ratio']:.4f} of a ResNet-18's step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="for the comparison; a tenth for each point of growth"
    )
    parser.add_argument("--checkpoint", help="a network trained with the penalty; by default one is trained first")
    parser.add_argument("--train-steps", type=int, default=2000, help="of that training")
    parser.add_argument("--jacobian-regularizer", type=Path, help="a copy of the peer's repository")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plots", type=Path, help="also draw error_against_cost and growth into this directory")
    parser.add_argument("--measured", type=Path, help="a file of --json, whose figures to print and draw; measure none")
    arguments = parser.parse_args()
    if arguments.measured:
        results = json.loads(arguments.measured.read_text())
    else:
        results = measure(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2))
    print_tables(results)
    if arguments.plots:
        write_picture(error_against_cost(results), arguments.plots / "error_against_cost")
        write_picture(growth_of_cost(results), arguments.plots / "growth")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the tables and figures show, measured on this machine."""
    keep_freed_memory()  # as train.py does
    on_cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else on_cpu
    trained = regularised(arguments.checkpoint, arguments.train_steps)
    case = replace(trained, images=trained.images[:32], labels=trained.labels[:32])
    plain = peak_memory(ours(case, None))
    return {
        "machine": machine,
        **{"python": platform.python_version(), "torch": torch.__version__},
        "network": arguments.checkpoint or f"trained for {arguments.train_steps} steps",
        "steps": compare(case, arguments.seconds, arguments.jacobian_regularizer),
        "memory": {
            name: peak_memory(ours(case, penalty)) / plain
            for name, penalty in (("1 probe", frobenius(1)), ("2 probes", frobenius(2)))
        },
        "errors": errors(trained),
        "growth": growth(arguments.seconds / 10),
        "factor": factor_share(),
    }


if __name__ == "__main__":
    main()
