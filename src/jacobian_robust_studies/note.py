"""The note's Table 1 and Figure 1, reproduced: ``jacobian-robust study note``, in a clone of the project.

Trains what is missing (about half an hour a network on two CPU cores), attacks it, and writes the tables and the costs
into RESULTS/note.md and the figures beside it. Run again, it makes only what is missing; existing weights give the same
numbers.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from pydantic import ValidationError

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Budget, Results
from jacobian_robust_studies.documents import Document, run_entry_point

__all__ = ["COST", "NETWORKS", "Network", "Outcome", "cost", "reproduce", "table"]


@dataclass(frozen=True)
class Network:
    """A network of the note."""

    experiment: str  # the preset that trains it
    label: str  # its name in the tables
    # The note's Table 1: images classified correctly, of 10,000, and of these, still at each budget; None without one.
    published: tuple[int, ...] | None = None
    model: str | None = None  # the model that is attacked with its weights, if it is not the one that was trained


NETWORKS = (
    Network("note_vanilla", "vanilla", (9740, 4138, 428, 103)),
    Network("note_vanilla_double_softmax", "vanilla, softmax applied twice"),
    Network("note_vanilla_double_softmax", "the same weights, attacked without the second softmax", model="lenet"),
    Network("note_regularized", "regularised, eq. 15", (8829, 8040, 3708, 211)),
    Network("note_regularized_inner_softmax", "regularised, eq. 15 of the first of two softmaxes"),
    Network("note_constant_eta", "regularised, eq. 15, η = 0.005 throughout"),
    Network("note_isometry", "isometry, the penalty before eq. 15"),
)

FIGURE_1 = (
    ("note_regularized", "note_vanilla", "figure1", "one softmax"),
    ("note_regularized_inner_softmax", "note_vanilla_double_softmax", "figure1_two_softmaxes", "two softmaxes"),
)
"""The regularised and the vanilla network of each version of Figure 1, its file and its title."""

TEST_IMAGES = 10_000

COST = Path("docs/jacobian_norms/step_cost.json")
"""What ``benchmarks/step_cost.py`` measured, in a clone."""


@dataclass(frozen=True)
class Outcome:
    """A trained network and its evaluation."""

    network: Network
    seed: int  # of its training
    results: Results
    rows: list[dict[str, float | int]]  # one for each epoch, as in metrics.csv


def reproduce(
    networks: Sequence[Network],
    seeds: Sequence[int],
    *,
    results: Path,
    runs: Path,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> list[Outcome]:
    """Train, attack and report what is missing; return everything there is then.

    Args:
        networks: to work at; what is known of the others is reported too.
        seeds: of their trainings; other seeds whose weights exist are attacked and reported too.
        results: directory with ``checkpoints/`` and ``note/``.
        runs: directory for new runs.
        limit: attack the first images only; ``None`` for all.
        overrides: further options of ``train.py``.

    Raises:
        UserError: if a command fails, or a file there cannot be read.
    """
    costs = cost(COST)
    document = Document(
        results / "note.md", "python -m jacobian_robust_studies.note", "The note's Table 1 and Figure 1"
    )
    outcomes = []
    for network in dict.fromkeys([*NETWORKS, *networks]):
        for seed in sorted({*_seeds(results, network), *(seeds if network in networks else [])}):
            weights = _weights(results, network, seed)
            name = f"{weights.stem}_{network.model}" if network.model else weights.stem
            evaluation = results / "note" / f"{name}.json"
            if network in networks:
                if not weights.is_file():
                    _train(network, seed, weights, runs / weights.stem, overrides)
                if not _is_of(evaluation, weights, limit):
                    _attack(network, weights, evaluation, runs / "evaluations" / name, limit)
            elif not _is_of(evaluation, weights, limit):
                continue
            stored = Results.model_validate_json(evaluation.read_bytes())
            outcomes.append(Outcome(network, seed, stored, load_checkpoint(weights).rows))
    figures = _figures(outcomes, results / "note")
    document.write(f"{table(outcomes)}\n{costs}{figures}")
    return outcomes


def _weights(results: Path, network: Network, seed: int) -> Path:
    suffix = f"_seed{seed}" if seed else ""
    return results / "checkpoints" / f"{network.experiment}{suffix}.safetensors"


def _seeds(results: Path, network: Network) -> list[int]:
    """Return the seeds whose weights exist."""
    names = [path.stem for path in (results / "checkpoints").glob(f"{network.experiment}*.safetensors")]
    matches = [re.fullmatch(rf"{network.experiment}(?:_seed(\d+))?", name) for name in names]
    return [int(found[1] or 0) for found in matches if found]


def _train(network: Network, seed: int, path: Path, directory: Path, overrides: Sequence[str]) -> None:
    begun = [directory, *sorted(directory.parent.glob(f"{directory.name}.[0-9]*"))]
    exported = [run / "model.safetensors" for run in begun if (run / "model.safetensors").is_file()]
    if not exported:
        checkpoints = [run / "checkpoints" / "last.ckpt" for run in begun]
        resumed = [f"ckpt_path={checkpoint}" for checkpoint in checkpoints if checkpoint.is_file()][-1:]
        if directory.exists():  # an interrupted run: it goes on in a directory beside it
            directory = directory.with_name(f"{directory.name}.{len(begun)}")
        run_entry_point(
            *("train.py", f"experiment={network.experiment}", f"seed={seed}", "logger=csv"),
            *(f"hydra.run.dir={directory}", *resumed, *overrides),
        )
        exported = [directory / "model.safetensors"]
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(exported[-1], path)


def _is_of(evaluation: Path, weights: Path, limit: int | None) -> bool:
    """Return whether an evaluation exists and is of these weights, on as many images."""
    try:
        results = Results.model_validate_json(evaluation.read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    (model,) = results.models
    return model.images == (limit or TEST_IMAGES) and model.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def _attack(network: Network, weights: Path, evaluation: Path, directory: Path, limit: int | None) -> None:
    if (directory / "robustness.json").exists():
        shutil.rmtree(directory)  # of other weights, or on other images
    resumed = ["resume=true"] if directory.exists() else []
    options = [f"limit={limit}"] * bool(limit) + [f"model={network.model}"] * bool(network.model)
    run_entry_point(
        *("evaluate.py", f"checkpoint={weights}", "suite=note", "logger=csv", *options),
        *(f"hydra.run.dir={directory}", *resumed),
    )
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / "robustness.json", evaluation)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return Table 1 as Markdown: the note's rows and ours, with the mean and the spread of several seeds."""
    budgets = [budget.eps for budget in _budgets(outcomes[0])]
    images = outcomes[0].results.models[0].images
    lines = [
        f"Images that PGD leaves correctly classified, of {images}; each budget on its own. In brackets the share of "
        "those that are correctly classified clean, which is the note's convention. With eq. 15, ours are trained with "
        "one probe for the norm, the note's with the exact one.",
        "",
        f"| | seed | clean | {' | '.join(f'ℓ∞ {eps:g}' for eps in budgets)} | sanity |",
        "| --- | --- | --- |" + " --- |" * (len(budgets) + 1),
    ]
    for network in dict.fromkeys(outcome.network for outcome in outcomes):
        if network.published:
            clean, *robust = network.published
            cells = [f"{count} ({count / clean:.0%})" for count in robust]
            lines.append(f"| {network.label}, **the note** | | {clean} | {' | '.join(cells)} | |")
        members = [outcome for outcome in outcomes if outcome.network == network]
        for outcome in members:
            (model,) = outcome.results.models
            cells = [f"{budget.correct} ({budget.share_of_attacked or 0:.1%})" for budget in _budgets(outcome)]
            lines.append(
                f"| {network.label} | {outcome.seed} | {model.clean_correct} | {' | '.join(cells)} | "
                f"{model.verdict or '–'} |"
            )
        if len(members) > 1:
            counts = [(m.results.models[0].clean_correct, *(b.correct for b in _budgets(m))) for m in members]
            lines.append(f"| {network.label} | mean ± s.d. | {' | '.join(map(_spread, zip(*counts, strict=True)))} | |")
    return "\n".join(lines) + "\n"


def cost(path: Path) -> str:
    """Return a table of the cost of a training step, and how well the fast norms agree with the exact one.

    Args:
        path: ``step_cost.json``, as ``benchmarks/step_cost.py`` writes it.

    Raises:
        UserError: if it is not there, or is another file.
    """
    try:
        measured = json.loads(path.read_bytes())
        ratios = [measured["steps"][way]["ratio"] for way in ("exact Frobenius", "2 probes", "1 probe")]
        found = {way: measured["errors"][way] for way in ("2 probes", "1 probe")}
        errors = {way: (error["bias_of_square"], error["standard_error"]) for way, error in found.items()}
        machine = f"{measured['machine']}, torch {measured['torch']}"
    except FileNotFoundError as error:
        raise UserError(f"run this in a clone of the project: {path} is not in the working directory") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what benchmarks/step_cost.py writes: {error!r}") from error
    agree = "agree" if all(abs(bias) <= 3 * error for bias, error in errors.values()) else "do not agree"
    off = ", ".join(f"{100 * bias:+.2f}% ± {100 * error:.2f}% with {way}" for way, (bias, error) in errors.items())
    return (
        f"A training step's cost, in plain steps, side by side in one run ({machine}; "
        "[step_cost.json](../jacobian_norms/step_cost.json)):\n\n"
        "| exact norm, **the note** | exact norm | 2 probes | 1 probe |\n| --- | --- | --- | --- |\n"
        f"| almost 12 | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} |\n\n"
        f"Exact and fast norms {agree} in value: the mean of the square is off by {off} (± the standard error). "
        "What training with them leads to differs: [norms.md](norms.md), “The same result?”.\n"
    )


def _budgets(outcome: Outcome) -> list[Budget]:
    return outcome.results.models[0].threats[0].budgets


def _spread(values: Sequence[int]) -> str:
    return f"{fmean(values):.0f} ± {stdev(values):.0f}"


def _figures(outcomes: Sequence[Outcome], directory: Path) -> str:
    """Draw the figures that the outcomes allow, and return the Markdown that shows them."""
    rows: dict[str, list[dict[str, float | int]]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.network.experiment, outcome.rows)
    figures, shown = {}, ""
    for regularized, vanilla, name, softmaxes in FIGURE_1:
        if {regularized, vanilla} <= rows.keys():
            figures[name] = plots.training_curves(
                rows[regularized], twin=rows[vanilla], penalised=True, validation_name="test"
            )
            what = f"Figure 1, {softmaxes}: loss, cross-entropy and penalty over the epochs, first seed"
            shown += f"\n![{what}](note/{name}.png)\n"
    labels = {outcome.network.experiment: outcome.network.label for outcome in reversed(outcomes)}
    figures["progress"] = plots.progress({labels[name]: found for name, found in rows.items()})
    for name, figure in figures.items():
        plots.write_picture(figure, directory / name)
    return shown + "\n![Cross-entropy and error of all networks over the epochs, first seed](note/progress.png)\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Reproduce as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m jacobian_robust_studies.note",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(network.experiment for network in NETWORKS))
    parser.add_argument("--experiments", nargs="+", choices=names, default=names, help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings; 0 by default")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="where to train; %(default)s")
    parser.add_argument("--limit", type=int, help="attack the first images only")
    parser.add_argument("overrides", nargs="*", help="further options of train.py")
    arguments = parser.parse_args(argv)
    with ends_in_one_line(again="run the same command again to go on"):
        outcomes = reproduce(
            [network for network in NETWORKS if network.experiment in arguments.experiments],
            arguments.seeds,
            results=arguments.results,
            runs=arguments.runs,
            limit=arguments.limit,
            overrides=arguments.overrides,
        )
    print(f"\n{table(outcomes)}\nresults: {arguments.results}/note.md, note/*.json, note/*.png")


if __name__ == "__main__":
    main()
