import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from jacobian_robust.cli.sweeps import Job
from jacobian_robust.config import build
from jacobian_robust.errors import UserError
from jacobian_robust.penalties import Penalty
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Results, Threat
from jacobian_robust_studies import documents
from jacobian_robust_studies.defences import __main__ as command
from jacobian_robust_studies.defences import run
from jacobian_robust_studies.defences.figures import trials_by_method
from jacobian_robust_studies.defences.plan import Method, Plan, Trial, best, choice, read_plan
from jacobian_robust_studies.defences.record import Record
from jacobian_robust_studies.defences.report import protocol, table, tuned, write_report
from jacobian_robust_studies.defences.run import Concurrency
from jacobian_robust_studies.documents import Document

from ..end_to_end.conftest import ROOT, composed
from ..robustness.test_schema import model

PLAN = read_plan(ROOT / "conf" / "defences.yaml")


def trial(clean, robust):
    return Trial((), clean, robust)


def test_the_best_trial_is_the_most_robust_of_those_that_are_accurate_enough():
    sturdy, tuned, plain = trial(0.97, 0.9), trial(0.985, 0.8), trial(0.99, 0.5)
    assert best([sturdy, tuned, plain], 0.98) is tuned
    assert best([sturdy, trial(0.96, 0.95)], 0.98) is sturdy, "none is: the most accurate"


def test_a_trial_that_failed_is_never_the_best():
    failed = trial(math.nan, math.nan)
    assert best([failed, trial(0.5, 0.1)], 0.98).clean == 0.5
    assert best([failed], 0.98) is None


def test_a_plan_gives_every_method_as_many_trials():
    stated = PLAN.model_dump()
    stated["methods"]["vanilla"]["tune"] = {"optimizer.lr": [0.1]}
    with pytest.raises(ValueError, match=r"methods.vanilla.tune: 1 combinations"):
        Plan.model_validate(stated)


@pytest.mark.parametrize(
    ("text", "said"), [("batches: 0", "batches"), ("a: [", "cannot be read"), ("extra: 1", "extra"), ("", "methods")]
)
def test_a_plan_that_is_none_is_one_line(tmp_path, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PLAN.methods)
def test_every_method_of_the_plan_can_be_made(name):
    method = PLAN.methods[name]
    tune = PLAN.methods[method.as_tuned].tune if method.as_tuned else method.tune
    first = [f"{option}={values[0]}" for option, values in tune.items()]
    cfg = composed("train", *PLAN.options, *method.options, *PLAN.tuning, *first, "output_dir=somewhere")
    assert isinstance(build(cfg, "regularizer", optional=True), Penalty | None)
    for evaluation in PLAN.evaluations.values():
        composed("evaluate", *evaluation.options, "output_dir=somewhere")


METHODS = {
    "fgsm": Method(
        options=["adversary=fgsm"], tune={"adversary.eps": [0.1, 0.2]}, cost=2, finalist=True, adversarial=True
    ),
    "vanilla": Method(options=[], tune={"optimizer.lr": [0.1, 0.2]}, cost=1),
    "longer": Method(options=["adversary=fgsm"], as_tuned="fgsm", cost=2, budget=4),
}
SMALL = Plan(
    options=["scheduler=one_cycle"],
    **{"batches": 100, "trial_epochs": 1, "epochs": 2, "seeds": [0, 1, 2], "trials": 2, "tuning": ["limit=500"]},
    **{"objective": "robust", "clean": 0.95, "evaluations": {"pgd": {"options": []}}, "methods": METHODS},
)
FAILED = Trial(("optimizer.lr=0.2",), math.nan, math.nan)
TRIALS = {
    "fgsm": [Trial(("adversary.eps=0.1",), 0.98, 0.8), Trial(("adversary.eps=0.2",), 0.94, 0.9)],
    "vanilla": [FAILED, FAILED],
}


def made(*models):
    return Results(
        split="test", independent=False, seed=0, device="cpu", versions={}, attacks={"pgd": {}}, models=models
    )


def test_the_table_has_the_mean_and_the_spread_of_the_seeds_and_tells_of_those_that_failed():
    both = made(model("a", 0, 0.9, 0.5), model("b", 1, 0.8, 0.7))
    rows = table(SMALL, {"fgsm": (both, 1), "longer": (made(model("a", 0, 0.9, 0.5)), 0)}).splitlines()
    assert "| fgsm | yes | 2, 1 failed | 85.0 ± 7.1 | 60.0 ± 14.1 |" in rows
    assert "| longer (4 times the cost) | no | 1 | 90.0 | 50.0 |" in rows
    assert "standard error of up to 5.0 points" in rows[0], "of 100 images"


def in_two_norms(name, seed, clean, stood, stood_l2):
    linf = model(name, seed, clean, stood)
    budget = linf.threats[0].budgets[0].model_copy(update={"eps": 1.5, "robust_accuracy": stood_l2})
    return linf.model_copy(update={"threats": [*linf.threats, Threat(norm="l2", budgets=[budget])]})


def test_the_report_shows_all_methods_under_attack_apart_by_what_they_train_on(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figures, directory: drawn.update(figures))
    record = Record(SMALL, tmp_path)
    record.add_trials("fgsm", TRIALS["fgsm"])
    record.add_trials("vanilla", [trial(0.97, 0.5)])
    evaluated = {
        "fgsm": made(in_two_norms("a", 0, 0.9, 0.5, 0.4), in_two_norms("b", 1, 0.8, 0.7, 0.6)),
        "vanilla": made(in_two_norms("a", 0, 0.99, 0.3, 0.2)),
        "longer": made(in_two_norms("a", 0, 0.99, 0.2, 0.1)),
    }
    for name, results in evaluated.items():
        (tmp_path / "made.json").write_text(results.model_dump_json())
        record.add_evaluation(name, "pgd", tmp_path / "made.json", 0)
    write_report(record, Document(tmp_path / "defences.md", "python", "Defences"))
    assert "](defences/pgd.png)" in (tmp_path / "defences.md").read_text()
    trained_on, without = drawn["pgd"].axes
    assert [label.get_text() for label in without.get_yticklabels()] == ["longer", "vanilla"], "the best on top"
    shown = {line.get_label(): line.get_xdata() for line in trained_on.lines}
    assert {met: pytest.approx(list(shares)) for met, shares in shown.items()} == {
        "clean": [0.85],
        "ℓ∞ 0.1": [0.6],
        "ℓ2 1.5": [0.5],
    }, "means of the seeds"


def test_the_committed_study_is_what_its_files_say(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda *_: None)
    shutil.copy(ROOT / "docs" / "results" / "defences.md", tmp_path)
    record = Record(PLAN, ROOT / "docs" / "results" / "defences")
    document = Document(
        tmp_path / "defences.md", "python -m jacobian_robust_studies.defences", "Defences at equal cost"
    )
    write_report(record, document)
    assert document.path.read_text() == (ROOT / "docs" / "results" / "defences.md").read_text()
    assert list(record.trials()) == [name for name, method in PLAN.methods.items() if method.as_tuned is None]
    for kind in PLAN.evaluations:
        assert list(record.evaluations(kind)) == list(PLAN.methods)


def test_all_trials_are_shown_and_a_method_whose_trials_failed_holds_nothing_up():
    rows = tuned(SMALL, TRIALS, {"longer"}).splitlines()
    assert "| fgsm | 2.00 | 100 | `adversary.eps=0.1` **98.0 / 80.0** · `adversary.eps=0.2` 94.0 / 90.0 |" in rows
    assert "| vanilla | 1.00 | 200 | `optimizer.lr=0.2` failed · `optimizer.lr=0.2` failed |" in rows
    assert "| longer | 2.00 | 400 | as fgsm: `adversary.eps=0.1` |" in rows
    assert not any("longer" in row for row in tuned(SMALL, TRIALS, {"fgsm"}).splitlines()), "it was not made"
    assert choice(SMALL, "vanilla", TRIALS) is None
    (row,) = (row for row in tuned(SMALL, {"fgsm": TRIALS["fgsm"][1:]}, {}).splitlines() if "fgsm" in row)
    assert row.endswith("**94.0 / 90.0** (chosen by accuracy: none is right on 95%) |")
    assert "right on 95%" in protocol(SMALL)


def test_what_another_plan_led_to_is_not_reported(tmp_path):
    record = Record(SMALL, tmp_path)
    for name, trials in TRIALS.items():
        record.add_trials(name, trials)
    (tmp_path / "of_fgsm.json").write_text(made(model("a", 0, 0.9, 0.5)).model_dump_json())
    for name in ("fgsm", "longer"):
        record.add_evaluation(name, "pgd", tmp_path / "of_fgsm.json", 2)
    assert record.trials()["fgsm"] == TRIALS["fgsm"]
    assert {name: failed for name, (_, failed) in record.evaluations("pgd").items()} == {"fgsm": 2, "longer": 2}

    other = SMALL.model_copy(update={"methods": METHODS | {"fgsm": METHODS["fgsm"].model_copy(update={"cost": 3.0})}})
    assert list(Record(other, tmp_path).trials()) == ["vanilla"]
    assert not Record(other, tmp_path).evaluations("pgd"), "nor what was tuned as it was"
    longer = SMALL.model_copy(update={"epochs": 3})
    assert list(Record(longer, tmp_path).trials()) == ["fgsm", "vanilla"], "the trials are no longer"
    assert not Record(longer, tmp_path).evaluations("pgd")
    Record(other, tmp_path).add_trials("fgsm", TRIALS["fgsm"][:1])
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 4, "they give way, and the other method's stay"


@pytest.mark.parametrize(
    ("name", "content"),
    [("trials.csv", "method,options\nfgsm,x\n"), ("trials.csv", "a,plan\nfgsm\n"), ("fgsm_pgd.json", "{")],
)
def test_a_damaged_record_is_one_line_that_names_the_file(tmp_path, name, content):
    record = Record(SMALL, tmp_path)
    record.add_trials("fgsm", TRIALS["fgsm"])
    (tmp_path / "made.json").write_text(made(model("a", 0, 0.9, 0.5)).model_dump_json())
    record.add_evaluation("fgsm", "pgd", tmp_path / "made.json", 0)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        record.evaluations("pgd")


@pytest.mark.parametrize("as_tuned", ["nobody", "longer"])
def test_a_variation_is_one_of_a_method_that_is_tuned(as_tuned):
    stated = SMALL.model_dump()
    stated["methods"]["longer"]["as_tuned"] = as_tuned
    with pytest.raises(ValueError, match=r"methods.longer.as_tuned: names a method that is tuned"):
        Plan.model_validate(stated)


def test_only_a_training_that_diverged_is_a_failure_of_the_method(tmp_path, monkeypatch):
    errors = ["its process was ended by SIGKILL: out of memory?"]
    monkeypatch.setattr(run, "run_entry_point", lambda *_, **__: None)
    monkeypatch.setattr(run, "read_jobs", lambda _: {"0": Job(overrides=[], status="failed", error=errors[0])})
    with pytest.raises(UserError, match=r"out of memory\?; run this again"):
        run._sweep([], tmp_path / "vanilla", "0", 1, Concurrency(1, 1))
    errors[0] = "training diverged: the loss of 3 steps in a row was not finite"
    (job,) = run._sweep([], tmp_path / "vanilla", "0", 1, Concurrency(1, 1)).values()
    assert job.status == "failed"


def test_a_panel_shows_a_methods_trials_in_their_order_and_says_which_lie_outside():
    points = {"eps=1": (0.98, 0.5), "eps=2": (0.97, 0.7), "eps=3": (0.6, 0.1), "eps=4": (math.nan, math.nan)}
    trials = [Trial((option,), *point) for option, point in points.items()]
    figure = trials_by_method({"a": trials, "b": [Trial(("lr=0",), 0.99, 0.4)]}, robust="robust_accuracy_linf_0.1")
    first, second = figure.axes
    grey, own = first.lines
    assert len(grey.get_xdata()) == 3
    assert list(zip(*own.get_data(), strict=True)) == [(0.98, 0.5), (0.97, 0.7), (0.6, 0.1)]
    assert [text.get_text() for text in first.texts] == ["1", "2", "further left, clean / robust:\n3: 60% / 10%"]
    assert first.get_xlim()[0] > 0.9
    assert [text.get_text() for text in second.texts] == ["0"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("methods", "nine", "the plan has linear_margin, "),
        ("evaluations", "nine", "the plan has pgd, "),
        ("jobs", "0", "at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_what_can(option, value, said, monkeypatch, tmp_path):
    plan = ["--plan", str(ROOT / "conf" / "defences.yaml"), "--results", str(tmp_path), "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["defences", *plan, f"--{option}", value])
    with pytest.raises(SystemExit, match=f"^error: --{option} {value}: {said}"):
        command.main()
    assert not list(tmp_path.iterdir())


def test_an_interruption_has_its_status_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "study", interrupted)
    monkeypatch.setattr(sys, "argv", ["defences", "--plan", str(ROOT / "conf" / "defences.yaml")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to go on\n"


def test_the_jobs_are_shared_out_over_the_methods_first():
    assert Concurrency.of(2, 26) == Concurrency(methods=2, jobs=1)
    assert Concurrency.of(7, 3) == Concurrency(methods=3, jobs=2)
    assert Concurrency.of(4, 1) == Concurrency(methods=1, jobs=4)
    assert Concurrency.of(1, 0) == Concurrency(methods=1, jobs=1)
    assert Concurrency(methods=64, jobs=64).threads(64) == 1


def test_methods_are_worked_at_side_by_side_and_a_failure_begins_no_more():
    together, begun = threading.Barrier(2), []

    def meet(name):
        together.wait(timeout=60)
        return name.upper()

    assert Concurrency(methods=2, jobs=1).map(meet, ["b", "c"]) == ["B", "C"]

    def fail_in_the_second(name):
        begun.append(name)
        if name == "b":
            raise UserError("b: failed")
        time.sleep(0.5)  # long after the failure is noticed

    with pytest.raises(UserError, match="b: failed"):
        Concurrency(methods=2, jobs=1).map(fail_in_the_second, "abcdefgh")
    assert len(begun) < 4


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A directory whose ``train.py`` does what it is told."""
    (tmp_path / "train.py").write_text("import sys\nexec(sys.argv[1])\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_has_its_share_of_the_processors_and_a_log_of_its_own(clone, capfd):
    documents.run_entry_point(
        "train.py", "import os; print(os.environ['OMP_NUM_THREADS'])", threads=3, log=clone / "log"
    )
    assert (clone / "log").read_text() == "3\n"
    assert capfd.readouterr().out.startswith("+ python train.py")
    with pytest.raises(UserError, match=r"status 4: .*log says why; run this again"):
        documents.run_entry_point("train.py", "sys.exit(4)", log=clone / "log")
    documents.run_entry_point("train.py", "sys.exit(4)", check=False)


def test_after_an_interruption_no_more_begins_and_what_was_begun_ends(clone):
    waiting = (
        "import pathlib, time; pathlib.Path(sys.argv[2]).touch(); time.sleep(1); pathlib.Path(sys.argv[3]).touch()"
    )

    def interrupt_when_both_run():
        while not all((clone / name).exists() for name in "ab"):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt_when_both_run, daemon=True).start()

    def work(name):
        documents.run_entry_point("train.py", waiting, name, f"{name} ended")

    try:
        with pytest.raises(KeyboardInterrupt):
            Concurrency(methods=2, jobs=1).map(work, "abc")
    finally:
        signal.signal(signal.SIGINT, before)
    assert all((clone / f"{name} ended").exists() for name in "ab")
    assert not (clone / "c").exists()


def test_a_variation_of_what_was_not_tuned_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_entry_point", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(UserError, match=r"^longer: takes the values of fgsm, .* name that too"):
        run.study(SMALL, ["vanilla", "longer"], [], results=tmp_path, runs=tmp_path)


@pytest.mark.slow
def test_it_makes_what_is_missing_only_and_keeps_what_was_written_by_hand(tmp_path):
    evaluation = ["attack=pgd_linf", "limit=20", "sanity_images=0", "geometry_images=0", "reliability=false"]
    stated = {
        "options": ["monitor_images=0", "trainer.limit_val_batches=2", "trainer.enable_progress_bar=false"],
        **{"batches": 20, "trial_epochs": 1, "epochs": 1, "seeds": [0, 1], "trials": 2},
        "tuning": ["attack=pgd_linf", "attack.pgd_linf.eps=[0.1]", "limit=20"],
        **{"objective": "robust_accuracy_linf_0.1", "clean": 0.98, "evaluations": {"pgd": {"options": evaluation}}},
        "methods": {"vanilla": {"options": ["regularizer=none"], "cost": 1, "finalist": True}},
    }
    stated["methods"]["vanilla"]["tune"] = {"optimizer.lr": [0.01, 0.1]}
    stated["methods"]["longer"] = {"options": ["regularizer=none"], "as_tuned": "vanilla", "cost": 1, "budget": 2}
    (tmp_path / "plan.yaml").write_text(json.dumps(stated))

    def run():
        command = [sys.executable, "-m", "jacobian_robust_studies.defences", "--plan", str(tmp_path / "plan.yaml")]
        places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
        done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    document = tmp_path / "results" / "defences.md"
    assert "+ python train.py -m" in run()
    written = document.read_text()
    assert "| vanilla | no | 2 |" in written
    assert "| longer (2 times the cost) | no | 1 |" in written
    document.write_text(f"{written}\nBy hand.\n")
    assert "+ python" not in run()
    assert document.read_text() == f"{written}\nBy hand.\n"
