"""The tables that were written by hand say what the results' files say."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SIMPLIFICATIONS = DOCS / "results" / "simplifications"


def rows(document, head):
    """Return the cells of the rows below each table head that begins so."""
    found = []
    for table in re.findall(rf"^\| {re.escape(head)}.*\n\| ---.*\n((?:\|.*\n)+)", document.read_text(), re.MULTILINE):
        found += [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return found


def falls(file, model, **of):
    """Return the counts of falls of one of a file's models, those of these fields."""
    measured = json.loads((SIMPLIFICATIONS / file / "simplifications.json").read_text())["models"][model]["falls"]
    return [found for found in measured if all(found[key] == value for key, value in of.items())]


NETWORKS = (("note_vanilla", 0, 1.5), ("note_regularized", 0, 1.5), ("toy", 0, 0.1), ("toy", 1, 0.1))


def test_what_accounts_for_the_falls():
    written = rows(DOCS / "results" / "simplifications.md", "| ε | correct")
    expected = []
    for file, model, _ in NETWORKS:
        of_note = falls(file, model, split="evaluated", bound="center", norm="frobenius")
        for i, found in enumerate(of_note):
            violated = found["images"] - found["satisfied"]
            fell = found["fell"] - found["satisfied_fell"]
            counts = (found["fell"], found["satisfied"], found["satisfied_fell"], found["by_center"])
            counts += (found["by_curvature"], fell, violated - fell)
            expected.append([f"{found['eps']:g}", "" if i else str(found["images"]), *map(str, counts)])
    assert [row[1:] for row in written] == expected


def test_the_variants_of_the_condition():
    written = iter(rows(DOCS / "results" / "simplifications.md", "| variant"))
    for file, model, eps in NETWORKS:
        for bound in ("center", "boundary"):
            for norm in ("frobenius", "spectral"):
                cells = next(written)[2:]
                for split in ("evaluated", "training"):
                    (found,) = falls(file, model, eps=eps, split=split, bound=bound, norm=norm)
                    of, fell = found["images"], found["satisfied_fell"]
                    assert cells[:3] == [f"{found['satisfied']} of {of}", str(fell), str(found["fell"] - fell)]
                    cells = cells[3:]
    assert not list(written)


def test_what_the_geometry_predicts():
    written = rows(DOCS / "results" / "README.md", "| images | rank correlation")
    expected = []
    for model in json.loads((DOCS / "results" / "geometry" / "robustness.json").read_text())["models"]:
        found = model["first_order"]
        medians = (f"{found['median_predicted']:.3g}", f"{found['median_found']:.2f}")
        correlation = f"{found['rank_correlation']:.2f}"
        expected.append([model["name"], str(found["images"]), correlation, *medians, str(found["unsafe"])])
    assert written == expected


def test_what_is_trained_with_either_norm():
    written = rows(DOCS / "results" / "simplifications.md", "% | accuracy | clean")
    norms = SIMPLIFICATIONS / "norms"
    evaluated = [model for path in norms.glob("*.json") for model in json.loads(path.read_text())["models"]]
    for row, name in zip(written, ("none", "frobenius", "spectral"), strict=True):
        models = [model for model in evaluated if model["name"].startswith(name)]
        metrics = [list(csv.DictReader(path.open())) for path in norms.glob(f"metrics_{name}_*.csv")]
        assert len(models) == len(metrics) == 3
        columns = [[float(epochs[-1]["validation_accuracy"]) for epochs in metrics]]
        columns.append([model["clean_accuracy"] for model in models])
        for threat, budgets in enumerate((3, 4)):
            for i in range(budgets):
                found = [model["threats"][threat]["budgets"][i]["correct"] / model["images"] for model in models]
                columns.append(found)
        assert row[1:] == [f"{fmean(column):.1%} ± {stdev(column):.1%}".replace("%", "") for column in columns]


def test_what_the_penalty_buys_on_the_toy_model():
    written = rows(DOCS / "toy.md", "| clean")
    expected = []
    for found in json.loads((DOCS / "toy" / "toy.json").read_text())["classifiers"]:
        for way, clean in (("search", f"{found['clean_accuracy']:.1%}"), ("pgd", "")):
            expected.append([clean, *(f"{budget[way]:.1%}" for budget in found["budgets"])])
    assert [row[1:] for row in written] == expected


@pytest.mark.parametrize(
    ("task", "number"), [("regression", 3), ("counts", 3), ("multilabel", 2), ("segmentation", 3), ("tabular", 3)]
)
def test_what_other_tasks_withstand(task, number):
    files = sorted((DOCS / "results" / "tasks").glob(f"{task}_seed*.json"))
    seeds = [json.loads(file.read_text())["models"] for file in files]
    assert len(seeds) == number
    expected = []
    for models in zip(*seeds, strict=True):  # one network from each seed
        budgets = [model["threats"][0]["budgets"] for model in models]
        shares = [[model["clean_accuracy"] for model in models]]
        for kind in ("robust_accuracy", "certified_accuracy"):
            shares += [[budget[kind] for budget in of_seeds] for of_seeds in zip(*budgets, strict=True)]
        clean, *rest = (f"{100 * fmean(share):.1f} ± {100 * stdev(share):.1f}" for share in shares)
        measured = [model["task"]["metrics"] if model["task"] else {} for model in models]
        metrics = [f"{fmean(of_seed[name] for of_seed in measured):.3g}" for name in measured[0]]
        steps = f"{fmean(model['plain_step_equivalents'] for model in models):,.0f}"
        verdicts = ", ".join(dict.fromkeys(model["verdict"] for model in models))
        expected.append([models[0]["name"], clean, *metrics, *rest, steps, verdicts])
    table = rows(DOCS / "results" / "tasks.md", f"{task}, {seeds[0][0]['images']} ")
    assert [[cell.strip("*") for cell in row] for row in table] == expected


def test_the_first_lines_of_the_note_are_of_its_files():
    folder = DOCS / "results" / "note"
    of = {path.stem: json.loads(path.read_text())["models"][0] for path in folder.glob("note_*.json")}
    seeds = [[of[name + seed] for seed in suffixes] for name, suffixes in SEEDS]
    clean, pgd, _, nines, others = (row[1:] for row in rows(DOCS / "results" / "note.md", "test images right"))
    for i, models in enumerate(seeds):
        robust = [100 * model["threats"][0]["budgets"][0]["robust_accuracy"] for model in models]
        right = [found["clean_correct"] for found in models[0]["classes"]]
        assert clean[i] == f"{fmean(model['clean_accuracy'] for model in models):.1%}"
        assert pgd[i] == f"{fmean(robust):.1f} ± {stdev(robust):.1f}%"
        assert [nines[i].strip("*"), others[i]] == [str(right[9]), f"{sum(right[:9]):,}"]


SEEDS = (("note_vanilla", ("", "_seed1", "_seed2")), ("note_regularized", ("", "_seed1")))
"""The networks of the note's first lines, the published ones first."""


def test_the_table_of_readme_is_what_the_quickstart_gave():
    models = json.loads((DOCS / "quickstart" / "robustness.json").read_text())["models"]
    expected = []
    for model in models:
        budget = model["threats"][0]["budgets"][1]
        shares = (model["clean_accuracy"], budget["robust_accuracy"], budget["certified_accuracy"])
        cost = model["plain_step_equivalents"] / models[0]["plain_step_equivalents"]
        expected.append([*(f"{share:.1%}" if share else "0%" for share in shares), f"{cost:.1f}"])
    expected[0][-1] = "1"
    written = [
        [cell.strip("*") for cell in row[1:]] for row in rows(DOCS.parent / "README.md", "MNIST, 1,000 test images")
    ]
    assert written == expected


def test_five_seeds_of_the_quickstart():
    files = sorted((DOCS / "quickstart").glob("robustness*.json"))
    seeds = [json.loads(file.read_text())["models"] for file in files]
    assert len(seeds) == 5
    expected = []
    for models in zip(*seeds, strict=True):
        budgets = [model["threats"][0]["budgets"][1] for model in models]
        shares = [
            [model["clean_accuracy"] for model in models],
            [budget["robust_accuracy"] for budget in budgets],
            [budget["certified_accuracy"] for budget in budgets],
        ]
        cells = [f"{100 * fmean(share):.1f} ± {100 * stdev(share):.1f}" for share in shares]
        expected.append([models[0]["name"], *cells, ", ".join(dict.fromkeys(model["verdict"] for model in models))])
    assert rows(DOCS / "getting-started.md", "five seeds") == expected


def test_what_is_certified_at_a_large_radius_is_what_its_file_says():
    (model,) = json.loads((DOCS / "results" / "certified" / "linf_03.json").read_text())["models"]
    expected = [
        [
            f"ℓ∞ {b['eps']:g}",
            *(f"{x:.1%}" for x in (model["clean_accuracy"], b["robust_accuracy"], b["certified_accuracy"])),
        ]
        for b in model["threats"][0]["budgets"]
    ]
    table = rows(DOCS / "results" / "certified.md", "preset")
    written = [
        [cell.strip("*") for cell in row[1:5]]
        for row in table
        if row[0] == "`certified_linf_03`" and row[1].startswith("ℓ∞")
    ]
    assert written == expected


@pytest.mark.parametrize(
    ("document", "file", "head", "with_cost"),
    [
        ("fashion_mnist", "pgd", "Fashion-MNIST, 1,000 test images", True),
        ("cifar10", "pgd", "CIFAR-10 (JPEG), 1,000 test images", True),
        ("fashion_mnist", "autoattack", "Fashion-MNIST, first 250 test images", False),
    ],
)
def test_what_the_networks_of_other_data_withstand(document, file, head, with_cost):
    models = json.loads((DOCS / "results" / document / f"{file}.json").read_text())["models"]
    expected = {}
    for model in models:
        (threat,) = model["threats"]
        shares = [x for b in threat["budgets"] for x in (b["robust_accuracy"], b["certified_accuracy"])]
        cost = [f"{model['plain_step_equivalents']:,.0f}"] if with_cost else []
        expected[model["name"]] = [f"{x:.1%}" for x in (model["clean_accuracy"], *shares)] + [*cost, model["verdict"]]
    written = rows(DOCS / "results" / f"{document}.md", head)
    assert {name: cells for name, *cells in written} == expected
