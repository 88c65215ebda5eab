"""One report of finished evaluations: ``python -m jacobian_robust.reporting.compare PLACE… --out DIRECTORY``.

A place is an evaluation, a run that ended in one (evaluate=true), or a sweep of such runs. They can have been made side
by side, on several machines. Models that differ in their training seed alone are also shown as mean ± standard
deviation. The runs of a sweep are called by what distinguishes them, and drawn over the option that was varied. The
pictures of adversarial examples are taken over from the single evaluations.
"""

import argparse
import base64
import contextlib
import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf
from pydantic import ValidationError
from rich.console import Console
from torch import tensor

from jacobian_robust.config import flat
from jacobian_robust.errors import UserError, describe, ends_in_one_line
from jacobian_robust.files import claimed, distinct_names, write_atomically
from jacobian_robust.reporting import figures as plots
from jacobian_robust.reporting.console import print_results
from jacobian_robust.reporting.html import Sheet, write_report
from jacobian_robust.reporting.wandb import WandbOptions, log_evaluation, wandb_run
from jacobian_robust.robustness.schema import Results, groups, table_rows

__all__ = ["compare", "gather"]

ALIKE = ("split", "independent", "seed", "attacks")
"""What has to be the same for figures to be put side by side."""


def _evaluations(places: Sequence[Path]) -> list[Path]:
    """Return the results files of evaluations, of runs and of sweeps of runs."""
    found = []
    for place in places:
        if file := _evaluation(place):
            found.append(file)
            continue
        jobs = sorted(path.parent for path in place.glob("*/config.yaml"))
        evaluated = [file for job in jobs if (file := _evaluation(job))]
        if not evaluated:
            raise UserError(f"{place}: no robustness.json here, in its evaluation/, or in those of the runs below it")
        if without := [job.name for job in jobs if not _evaluation(job)]:
            print(
                f"{place}: {len(without)} of {len(jobs)} runs were not evaluated and are left out: {', '.join(without)}"
            )
        found += evaluated
    return found


def _evaluation(place: Path) -> Path | None:
    files = (place, place / "robustness.json", place / "evaluation" / "robustness.json")
    return next((file for file in files if file.is_file()), None)


def _read(place: Path) -> tuple[Path, Results]:
    file = place.resolve()
    called = file.parent if file.name == "robustness.json" else file.with_suffix("")
    try:
        return called, Results.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{place} is no evaluation of this version ({error.error_count()} errors): evaluate the checkpoint again"
        ) from error


def gather(places: Sequence[Path]) -> Results:
    """Return the models of finished evaluations as one evaluation.

    Args:
        places: directories of evaluations, of runs that hold one or of sweeps of such runs; ``robustness.json`` files.

    Raises:
        UserError: if one cannot be read, or was attacked in another way than the first.
    """
    return _together(_read_all(places))


def _read_all(places: Sequence[Path]) -> dict[Path, Results]:
    """Return the evaluations by their directory, all of them made alike."""
    read: dict[Path, Results] = {}
    for place in _evaluations(places):
        directory, results = _read(place)
        if directory in read:
            raise UserError(f"{directory} is named twice")
        read[directory] = results
    (first, of), *rest = read.items()
    certificates = _certificates(list(read.values()))
    for place, other in rest:
        if different := [name for name in ALIKE if getattr(other, name) != getattr(of, name)]:
            raise UserError(f"{place} was evaluated otherwise than {first}: {', '.join(different)} differ")
        if unlike := [name for name in other.certificates if other.certificates[name] != certificates[name]]:
            raise UserError(f"{place} was certified otherwise than the others: the parameters of {unlike[0]} differ")
        if list(other.attacks) != list(of.attacks):  # of dictionaries, equality ignores the order
            orders = f"{', '.join(other.attacks)}, not {', '.join(of.attacks)}"
            raise UserError(
                f"{place} was attacked in another order than {first}, which decides what each met: {orders}"
            )
        if other.models[0].images != of.models[0].images:
            raise UserError(f"{place} has {other.models[0].images} images, {first} {of.models[0].images}")
        if other.models[0].data != of.models[0].data:
            raise UserError(f"{place} is of {other.models[0].data}, {first} of {of.models[0].data}")
    return read


Place = tuple[Path, str]
"""A model: the directory of its evaluation, and its name there."""


def _names(read: Mapping[Path, Results]) -> dict[Place, str]:
    """Return what each model is called: the options in which its run differs from the others, if these are known."""
    names = {
        (directory, model.name): name if len(results.models) == 1 else f"{name}/{model.name}"
        for name, (directory, results) in zip(distinct_names(list(read)), read.items(), strict=True)
        for model in results.models
    }
    options = {place: " ".join(f"{key}={value}" for key, value in row.items()) for place, row in _varied(read).items()}
    return options if len({*options.values(), ""}) == len(names) + 1 else names


def _varied(read: Mapping[Path, Results]) -> dict[Place, dict[str, Any]]:
    """Return, by model, the options in which the runs differ; none unless all were trained by runs of this project."""
    runs = {(directory, model.name): _run(directory, model.name) for directory, r in read.items() for model in r.models}
    if not all(runs.values()):
        return {place: {} for place in runs}
    everywhere = set.intersection(*(set(options) for options in runs.values())) - {"name", "output_dir", "resume"}
    first = next(iter(runs.values()))
    varied = [
        key
        for key in first
        if key in everywhere
        and not key.startswith(("search.", "hydra."))
        and any(options[key] != first[key] for options in runs.values())
    ]
    return {place: {key: options[key] for key in varied} for place, options in runs.items()}


def _run(evaluation: Path, model: str) -> dict[str, Any]:
    """Return the options of the run that an evaluation is part of, by their dotted names."""
    for run in (evaluation.parent / model, evaluation.parent):  # of a twin pair, of a run
        if (run / "summary.json").is_file() and (run / "config.yaml").is_file():
            config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
            target = (config.get("regularizer") or {}).get("_target_", "none")
            # Of groups, of which another choice has other fields, the class; and the fields that all runs share.
            return {"regularizer": str(target).rpartition(".")[-1].lower()} | flat(
                {key: value for key, value in config.items() if key != "regularizer" or value}
            )
    return {}


def _together(read: Mapping[Path, Results]) -> Results:
    """Return the evaluations as one, the devices and versions of all of them named where these differ."""
    names = _names(read)
    models = [
        model.model_copy(update={"name": names[directory, model.name]})
        for directory, results in read.items()
        for model in results.models
    ]
    evaluations = list(read.values())
    made = {
        "certificates": _certificates(evaluations),
        "device": _joined([results.device for results in evaluations], ", "),
        "versions": {
            package: _joined([r.versions[package] for r in evaluations if package in r.versions], " / ")
            for package in dict.fromkeys(package for results in evaluations for package in results.versions)
        },
    }
    return evaluations[0].model_copy(update={"models": models} | made)


def _certificates(evaluations: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Return the certificates of all evaluations; one that lacks some of them has no figure there."""
    return {name: options for results in reversed(evaluations) for name, options in results.certificates.items()}


def _joined(values: Sequence[str], separator: str) -> str:
    """Return distinct values in their order; one can be joined itself, of a comparison that is compared."""
    return separator.join(dict.fromkeys(part for value in values for part in value.split(separator)))


def _points(read: Mapping[Path, Results]) -> plots.Points:
    """Return each image's predicted radius and the smallest perturbation found, by the model, where they were kept."""
    points = {}
    for (directory, model), name in _names(read).items():
        with contextlib.suppress(FileNotFoundError), (directory / "images.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["name"] == model and row.get("predicted_l2")]
            if rows:
                predicted = tensor([float(row["predicted_l2"]) for row in rows])
                found = tensor([float(row["smallest_known_l2"] or "inf") for row in rows])
                points[name] = (predicted, found)
    return points


def _sheets(read: Mapping[Path, Results], directory: Path) -> list[Sheet]:
    """Return the pictures of adversarial examples that the evaluations left, for a report in a directory."""
    sheets = []
    for (place, model), name in _names(read).items():
        results = read[place]
        found = {
            norm: _picture(place, f"examples_{norm}{plots.suffix_of(model, len(results.models))}")
            for norm in results.norms
        }
        sheets += [Sheet(name, norm, png) for norm, png in found.items() if png]
        if not any(found.values()):
            seen = os.path.relpath(place, directory.resolve())
            sheets.append(Sheet(name, place=seen, link=quote(seen) if place.is_dir() else None))
    return sheets


def _picture(evaluation: Path, name: str) -> bytes | None:
    """Return a picture of an evaluation: its file, or what its report embeds."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (evaluation / f"{name}.png").read_bytes()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):  # another's file can hold anything
        text = (evaluation / "report.html").read_text(encoding="utf-8")
        embedded = re.search(f'<figure id="{re.escape(name)}"><img [^>]*base64,([A-Za-z0-9+/=]+)"', text)
        return base64.b64decode(embedded[1]) if embedded else None
    return None


def compare(
    places: Sequence[Path], directory: Path, over: str | None = None, logger: WandbOptions | None = None
) -> Results:
    """Write one report of finished evaluations into a directory, print it, and return its results.

    Args:
        places: as :func:`gather` takes them.
        directory: a new one.
        over: the option of the runs to draw the accuracies over; ``None`` for the number that varies, if one does.
        logger: where else to log.

    Raises:
        UserError: if an evaluation cannot be read or compared, or the directory holds results already.
    """
    read = _read_all(places)
    results = _together(read)
    varied = list(_varied(read).values())
    over = _drawn_over(varied, over)
    config = {"evaluations": [str(place) for place in places]}
    alike = groups(results.models)
    with (
        claimed(directory, config),
        wandb_run(
            logger,
            directory=directory,
            group=directory.resolve().name,
            name=f"comparison-{directory.resolve().name}"[:128],
            job_type="comparison",
            tags=list(results.attacks),
            config=config | {"training_runs": {model.name: model.wandb for model in results.models if model.wandb}},
        ) as run,
    ):
        figures = plots.comparison(results, alike)
        if over is not None:
            figures["trade_off"] = plots.trade_off(results, varied, over)
        points = _points(read)
        if points:
            figures["first_order"] = plots.predicted_against_found(points)
        files = plots.save(figures, directory)
        write_report(directory / "report.html", results, alike, files, config, sheets=_sheets(read, directory))
        if run is not None:
            log_evaluation(run, results, alike, table_rows(results), points, files, directory / "report.html")
        with write_atomically(directory / "robustness.json") as file:
            file.write(results.model_dump_json(indent=2))
        _write_rows(directory / "runs.csv", results, varied)
    print_results(results, alike)
    Console().print(f"results: {directory}/report.html, robustness.json, runs.csv, *.png", soft_wrap=True)
    return results


def _drawn_over(varied: Sequence[Mapping[str, Any]], over: str | None) -> str | None:
    """Return the option to draw over."""
    numbers = [
        key
        for key in varied[0]
        if key != "seed" and all(isinstance(row[key], int | float) and not isinstance(row[key], bool) for row in varied)
    ]
    if over is None:
        return numbers[0] if len(numbers) == 1 else None
    if over not in numbers:
        known = f"one of {', '.join(numbers)}" if numbers else "there is none here"
        raise UserError(f"--over {over}: give a number that varies over the runs; {known}")
    return over


def _write_rows(path: Path, results: Results, varied: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for each model: its options, its accuracies, its cost."""
    budgets = [(threat.norm, budget.eps) for threat in results.models[0].threats for budget in threat.budgets]
    with write_atomically(path) as file:
        writer = csv.writer(file)
        accuracies = ["clean_accuracy", *(f"robust_accuracy_{norm}_{eps:g}" for norm, eps in budgets)]
        certified = [f"certified_accuracy_{norm}_{eps:g}" for norm, eps in budgets] if results.certificates else []
        writer.writerow(["name", *varied[0], *accuracies, *certified, "plain_step_equivalents", "checkpoint"])
        for model, options in zip(results.models, varied, strict=True):
            met = [budget for threat in model.threats for budget in threat.budgets]
            shares = [*(b.robust_accuracy for b in met), *(b.certified_accuracy for b in met if certified)]
            values = [model.clean_accuracy, *shares, model.plain_step_equivalents, model.checkpoint]
            writer.writerow([model.name, *options.values(), *values])


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m jacobian_robust.reporting.compare", description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="directories of evaluations, runs or sweeps")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the report")
    parser.add_argument("--over", metavar="OPTION", help="of the runs, to draw the accuracies over, as eta.max")
    parser.add_argument("--wandb", choices=["offline", "online"], help="also log to W&B; offline, talk to no server")
    parser.add_argument("--project", default=WandbOptions().project, help="W&B project; %(default)s")
    arguments = parser.parse_args(argv)
    with ends_in_one_line():
        try:
            offline = arguments.wandb == "offline"
            logger = WandbOptions(offline=offline, project=arguments.project) if arguments.wandb else None
        except ValidationError as error:
            raise UserError(f"--{describe(error)}") from error
        compare(arguments.evaluations, arguments.out, arguments.over, logger)


if __name__ == "__main__":
    main()
