"""The study of accuracy against robustness: its plan, its record, its choice, its report and its command."""

import csv
import hashlib
import re
import threading
import time
from dataclasses import asdict

import pytest

from jacobian_robust.cli.sweeps import Job
from jacobian_robust.config import build
from jacobian_robust.errors import UserError
from jacobian_robust.penalties import Penalty
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.documents import Document
from jacobian_robust_studies.frontier import __main__ as command
from jacobian_robust_studies.frontier import run
from jacobian_robust_studies.frontier.figures import Point, frontier, pareto
from jacobian_robust_studies.frontier.plan import Cell, Grid, Method, Plan, read_plan
from jacobian_robust_studies.frontier.record import Record
from jacobian_robust_studies.frontier.report import missing, summary_table, write_report

from ..end_to_end.conftest import ROOT, composed
from ..robustness.test_schema import model

PLAN = read_plan(ROOT / "conf" / "frontier.yaml")
SMALL = Plan(
    eps=0.1,
    clean_loss=0.02,
    methods={
        "undefended": Method(options=[], cost=1),
        "fgsm": Method(options=["adversary=fgsm"], strength="adversary.eps", cost=2, adversarial=True),
    },
    grids={
        "quick": Grid(
            options=[],
            batches=100,
            lengths=[3],
            seeds=[0],
            validation=["limit=100"],
            test=["limit=100"],
            methods={"undefended": [], "fgsm": [0.1, 0.2, 0.3]},
        )
    },
)
UNDEFENDED = Cell("undefended", "", 3, 0)


def results(sha256, clean, robust, verdict="pass"):
    found = model("a", 0, clean, robust).model_copy(
        update={"sha256": sha256, "verdict": verdict, "plain_step_equivalents": 450.0}
    )
    return Results(
        split="test", independent=False, seed=0, device="cpu", versions={}, attacks={"pgd": {}}, models=[found]
    )


def add(record, cell, clean, robust, sha256=None):
    place = record.directory / "made"
    place.mkdir(parents=True, exist_ok=True)
    made = results(sha256 or f"of {cell.strength}", clean, robust)
    (place / "robustness.json").write_text(made.model_dump_json())
    record.add(cell, place)


@pytest.fixture
def record(tmp_path):
    """Return a record of all trainings of the small plan."""
    record = Record(SMALL, "quick", tmp_path / "frontier")
    add(record, UNDEFENDED, 0.99, 0.3, "of it")
    for strength, clean, robust in (("0.1", 0.98, 0.8), ("0.2", 0.97, 0.9), ("0.3", 0.93, 0.95)):
        add(record, Cell("fgsm", strength, 3, 0), clean, robust)
    return record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grids": {"quick": {"methods": {"fgsm": [0.1]}}}}, "lacks undefended"),
        ({"grids": {"quick": {"methods": {"undefended": [], "x": []}}}}, r"methods.x: not among methods"),
        ({"grids": {"quick": {"methods": {"undefended": [1]}}}}, "if and only if the method has a strength"),
        ({"eps": 0}, "eps"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(change, said, tmp_path):
    stated = SMALL.model_dump()
    for grid, fields in change.pop("grids", {}).items():
        stated["grids"][grid] |= fields
    (tmp_path / "plan.yaml").write_text(Plan.model_construct(**(stated | change)).model_dump_json(warnings=False))
    with pytest.raises(UserError, match=said) as refused:
        read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PLAN.methods)
def test_every_method_of_the_plan_can_be_made(name):
    method, full = PLAN.methods[name], PLAN.grids["full"]
    grid = "full" if name in full.methods else "quick"
    options = PLAN.training_options(grid, name, PLAN.grids[grid].lengths[0])
    if method.strength:
        options.append(f"{method.strength}={PLAN.grids[grid].methods[name][0]}")
    cfg = composed("train", *options, "output_dir=somewhere")
    assert isinstance(build(cfg, "regularizer", optional=True), Penalty | None)
    composed("evaluate", *PLAN.grids[grid].test, "output_dir=somewhere")


def test_all_lengths_cost_the_same_for_every_method():
    assert SMALL.steps_of("quick", "fgsm") == 50
    assert [cell.strength for cell in SMALL.cells("quick", "fgsm", 3)] == ["0.1", "0.2", "0.3"]
    assert SMALL.cells("quick", "undefended", 3) == [UNDEFENDED]


def test_the_most_robust_of_those_near_the_twins_accuracy_is_chosen(record):
    assert [cell.strength for cell in record.chosen("fgsm", 3)] == ["0.2"]
    strict = SMALL.model_copy(update={"clean_loss": 0.001})
    assert [c.strength for c in Record(strict, "quick", record.directory).chosen("fgsm", 3)] == ["0.1"], "most accurate"


def test_nothing_is_chosen_before_all_strengths_and_the_twin_are_known(tmp_path):
    record = Record(SMALL, "quick", tmp_path)
    add(record, Cell("fgsm", "0.1", 3, 0), 0.98, 0.8)
    assert record.chosen("fgsm", 3) == []
    add(record, UNDEFENDED, 0.99, 0.3)
    assert record.chosen("fgsm", 3) == []
    for strength in ("0.2", "0.3"):
        record.add(Cell("fgsm", strength, 3, 0), None)
    assert [cell.strength for cell in record.chosen("fgsm", 3)] == ["0.1"], "the others diverged"


def test_a_test_counts_for_the_weights_that_were_chosen_alone(record, tmp_path):
    made = tmp_path / "made.json"
    made.write_text(results("of 0.1", 0.98, 0.7).model_dump_json())
    record.add_test("fgsm", 3, made)
    assert record.tested("fgsm", 3) is None, "those of another strength"
    made.write_text(results("of 0.2", 0.96, 0.85).model_dump_json())
    record.add_test("fgsm", 3, made)
    assert record.tested("fgsm", 3).models[0].clean_accuracy == 0.96


def test_rows_of_another_plan_are_not_reported_and_what_is_missing_has_its_cost(record):
    cells, untested = record.missing()
    assert (cells, untested) == ([], [("undefended", 3), ("fgsm", 3)])
    fgsm = SMALL.methods["fgsm"].model_copy(update={"cost": 4.0})
    other = Record(SMALL.model_copy(update={"methods": SMALL.methods | {"fgsm": fgsm}}), "quick", record.directory)
    assert [cell.method for cell in other.missing()[0]] == ["fgsm"] * 3
    assert other.cost(Cell("fgsm", "0.1", 3, 0)) == 3 * 25 * 4.0, "by the plan"
    assert record.cost(Cell("fgsm", "0.1", 3, 0)) == pytest.approx(450.0), "as measured"
    told = missing(other)
    assert "- fgsm, 3 plain epochs: 3 trainings, 900" in told
    assert "- on test images: undefended (3), fgsm (3)" in told


def test_the_summary_has_both_evaluations_of_the_same_weights_and_no_figure_with_a_failing_verdict(record, tmp_path):
    made = tmp_path / "made.json"
    made.write_text(results("of 0.2", 0.96, 0.85).model_dump_json())
    record.add_test("fgsm", 3, made)
    (line,) = (line for line in summary_table(record).splitlines() if "fgsm" in line)
    assert "| **fgsm** | `adversary.eps=0.2` | 3 | 0 | 450 | 97.0 ± 1.7 | 90.0 ± 3.0 |" in line
    assert "| 96.0 ± 2.0 | 85.0 ± 3.6 | – | pass | `of 0.2` |" in line
    made.write_text(results("of 0.2", 0.96, 0.85, "fail").model_dump_json())
    record.add_test("fgsm", 3, made)
    assert "96.0" not in summary_table(record)


def test_the_front_has_what_nothing_beats_in_both():
    assert pareto([(0.9, 0.5), (0.8, 0.7), (0.85, 0.4), (0.9, 0.4), (0.7, 0.7)]) == [(0.8, 0.7), (0.9, 0.5)]


def test_the_picture_has_a_line_for_each_method_the_front_and_the_published_points():
    points = [Point(0.98, 0.5, 100, "0.1", 3), Point(0.97, 0.7, 100, "0.2", 3), Point(0.6, 0.6, 100, "0.3", 3)]
    figure = frontier(
        {"validation, ℓ∞ 0.1": {"a": points}, "validation, ℓ∞ 0.2": {"a": points[:1]}}, PLAN.published, {"a": "b"}
    )
    first, second = figure.axes
    said = [text.get_text() for text in first.texts if text.get_text()]
    assert said == ["1 more: less than 85% accurate", "a", *(point.label for point in PLAN.published)]
    assert [text.get_text() for text in second.texts if text.get_text()] == ["a"]
    (front,) = (line for line in first.lines if line.get_label() == "front")
    assert list(front.get_xdata()) == [0.97, 0.98]
    assert first.get_xlim()[0] == pytest.approx(0.85, abs=0.02)


def test_a_test_is_of_the_weights_that_the_training_left(record, tmp_path):
    """The exported weights are attacked on test images; the validation images met the checkpoint, a file of its own."""
    run_directory = tmp_path / "run"
    (run_directory / "evaluation").mkdir(parents=True)
    (run_directory / "model.safetensors").write_bytes(b"weights")
    for sha256 in ("of the checkpoint", hashlib.sha256(b"weights").hexdigest()):
        made = run_directory / "evaluation" / "robustness.json"
        made.write_text(results(sha256, 0.99, 0.3).model_dump_json())
        record.add(UNDEFENDED, made.parent)
        record.add_test("undefended", 3, made)
        assert record.rows()[UNDEFENDED].sha256 == hashlib.sha256(b"weights").hexdigest()
        assert (record.tested("undefended", 3) is None) == (sha256 == "of the checkpoint")


def test_a_damaged_record_is_one_line_that_names_the_file(record):
    (record.directory / "quick.csv").write_text("method,strength\nfgsm,x\n")
    with pytest.raises(UserError, match=r"quick\.csv is not what this command writes"):
        record.rows()


def test_only_a_training_that_diverged_is_a_failure_of_the_method(record, tmp_path, monkeypatch):
    error = ["its process was ended by SIGKILL: out of memory?"]
    monkeypatch.setattr(run, "run_entry_point", lambda *_, **__: None)
    monkeypatch.setattr(run, "read_job", lambda _: Job(overrides=[], status="failed", error=error[0]))
    with pytest.raises(UserError, match=r"out of memory\?; run this again"):
        run._train(record, UNDEFENDED, tmp_path, threads=1, alone=True)
    error[0] = "training diverged: the loss of 3 steps in a row was not finite"
    assert run._train(record, UNDEFENDED, tmp_path, threads=1, alone=True) is None
    monkeypatch.setattr(run, "read_job", lambda _: Job(overrides=[], status="finished"))
    made = run._train(record, UNDEFENDED, tmp_path, threads=1, alone=True)
    assert made.name == "evaluation"
    assert made.parent.name == "strength--seed-0"


def test_what_is_known_is_not_made_again(record, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_entry_point", lambda *_, **__: pytest.fail("nothing is missing"))
    before = record.rows()
    run.study(record, ["undefended", "fgsm"], [3], runs=tmp_path / "runs", jobs=1, test=False)
    assert record.rows() == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("grid", "nine", "the plan has quick, full, "),
        ("methods", "nine", "the plan has undefended, "),
        ("lengths", "9", "the plan has 2, "),
        ("jobs", "0", "at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_what_can(option, value, said, tmp_path):
    given = ["--plan", str(ROOT / "conf" / "frontier.yaml"), "--results", str(tmp_path), f"--{option}", value]
    with pytest.raises(SystemExit, match=f"^error: --{option} {value}: {said}"):
        command.main(given)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_listed_without_any_work(tmp_path, capsys):
    command.main(["--plan", str(ROOT / "conf" / "frontier.yaml"), "--results", str(tmp_path), "--missing"])
    assert "- fgsm, 2 plain epochs: 2 trainings, " in capsys.readouterr().out
    assert "- fgsm, 2 plain epochs: 2 trainings, " in (tmp_path / "frontier" / "quick.md").read_text()


def test_items_are_worked_at_side_by_side_and_a_failure_begins_no_more():
    together, begun = threading.Barrier(2), []
    run.side_by_side(lambda _: together.wait(timeout=60), ["b", "c"], 2)

    def fail_in_the_second(name):
        begun.append(name)
        if name == "b":
            raise UserError("b: failed")
        time.sleep(0.5)  # long after the failure is noticed

    with pytest.raises(UserError, match="b: failed"):
        run.side_by_side(fail_in_the_second, "abcdefgh", 2)
    assert len(begun) < 4


def test_the_committed_documents_are_what_the_files_say(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "write_picture", lambda *_: None)
    committed = ROOT / "docs" / "results"
    record = Record(PLAN, "quick", committed / "frontier")
    copies = []
    for path in (committed / "frontier.md", committed / "frontier" / "quick.md"):
        copy = tmp_path / path.name
        copy.write_text(path.read_text())
        copies.append(Document(copy, f"{command.COMMAND} --grid quick", ""))
    write_report(record, *copies)
    assert copies[0].path.read_text() == (committed / "frontier.md").read_text()
    assert copies[1].path.read_text() == (committed / "frontier" / "quick.md").read_text()


def test_every_number_of_the_summary_is_that_of_a_committed_row():
    """Read the table and the files anew, without the report's code: each cell by the hash of the row's weights."""
    folder = ROOT / "docs" / "results" / "frontier"
    text = (folder.parent / "frontier.md").read_text()
    table = re.search(r"^\| %.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    head = [cell.strip() for cell in text[table.start() :].splitlines()[0].strip("|").split("|")]
    with (folder / "quick.csv").open() as file:
        rows = {row["sha256"][:8]: row for row in csv.DictReader(file)}
    tests = [Results.model_validate_json(path.read_bytes()) for path in (folder / "quick").glob("*.json")]
    models = {found.sha256[:8]: found for made in tests for found in made.models}

    def percent(share, images):
        return f"{100 * share:.1f} ± {100 * (share * (1 - share) / images) ** 0.5:.1f}"

    for line in table[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row, split = rows[cells[-1].strip("`")], head.index("test: clean")
        robust = dict(point.split("=") for point in row["robust"].split())
        certified = dict(point.split("=") for point in row["certified"].split())
        assert cells[:4] == [
            cells[0],
            f"`{PLAN.methods[row['method']].strength}={row['strength']}`" * bool(row["strength"]),
            row["length"],
            row["seed"],
        ]
        assert cells[0].strip("*") == row["method"]
        assert cells[4] == f"{float(row['plain_steps']):,.0f}"
        shares = [row["clean"], *robust.values(), certified["0.1"]]
        assert cells[5:split] == [percent(float(share), int(row["images"])) for share in shares]
        if cells[split] == "–":
            continue
        tested = models[cells[-1].strip("`")]
        shares = [tested.clean_accuracy, *(share for _, share in tested.accuracy("linf")[1:])]
        shares.append(dict(tested.certified("linf"))[0.1])
        assert cells[split:-2] == [percent(share, tested.images) for share in shares]
        assert cells[-2] == tested.verdict != "fail"


def test_a_row_is_read_as_it_was_written(record):
    row = record.rows()[Cell("fgsm", "0.2", 3, 0)]
    assert (row.clean, row.robust_at(0.1), row.certified_at(0.1), row.plain_steps) == (0.97, 0.9, None, 450.0)
    assert asdict(row)["sha256"] == "of 0.2"


def test_the_bullets_say_what_the_rows_say():
    """The sentences above the table, from the committed trainings of six plain epochs and of two."""
    text = " ".join((ROOT / "docs" / "results" / "frontier.md").read_text().split())
    record = Record(PLAN, "quick", ROOT / "docs" / "results" / "frontier")
    known = record.rows()
    chosen = {
        (method, length): known[record.chosen(method, length)[0]]
        for method in PLAN.grids["quick"].methods
        for length in (2, 6)
        if record.chosen(method, length)
    }
    long = {method: row for (method, length), row in chosen.items() if length == 6}
    defended = [row.clean for method, row in long.items() if method != "undefended"]
    undefended = f"{100 * long['undefended'].clean:.1f}%"
    clean = f"{100 * min(defended):.1f} to {100 * max(defended):.1f}% accurate, the undefended network {undefended}"
    assert clean in text
    gained = {m: 100 * (row.robust_at(0.1) - chosen[m, 2].robust_at(0.1)) for m, row in long.items()}
    penalties = [gained[method] for method in ("linear_margin_noise", "frobenius_sphere", "input_gradient")]
    assert f"the penalties gain {min(penalties):.0f} to {max(penalties):.0f} points at ℓ∞ 0.1" in text
    assert f"certified network gains {gained['certified_margin']:.0f}" in text
    assert f"undefended one loses {-gained['undefended']:.0f}" in text
    certified = long["certified_margin"]
    proven = (
        f"{100 * certified.robust_at(0.1):.1f}% under attack at ℓ∞ 0.1 and {100 * certified.certified_at(0.1):.1f}%"
    )
    assert f"{proven} proven" in text
    assert f"linear margin with noise ({100 * long['linear_margin_noise'].robust_at(0.1):.1f}%)" in text
    of_penalties = [
        row for cell, row in known.items() if cell.length == 6 and not PLAN.methods[cell.method].adversarial
    ]
    of_penalties = [row for row in of_penalties if row.method not in ("undefended", "certified_margin")]
    best = max(row.robust_at(0.2) for row in of_penalties)
    led = [row.robust_at(0.2) for m, row in long.items() if m in ("fgsm", "pgd_3", "trades")]
    said = f"{100 * min(led):.0f} to {100 * max(led):.0f}% at ℓ∞ 0.2, where the best penalty has {100 * best:.0f}%"
    assert said in text
