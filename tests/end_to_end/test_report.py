"""The report of an evaluation, in a real browser too, and what an interruption costs."""

import base64
import csv
import json
import re
import shutil
import subprocess
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation import journal as journal_of
from jacobian_robust.evaluation import measure
from jacobian_robust.evaluation.classifiers import load_classifiers
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.evaluation.options import read_evaluation
from jacobian_robust.reporting.compare import compare
from jacobian_robust.reporting.wandb import WandbOptions
from jacobian_robust.robustness.schema import Results, groups

from . import wandb_records
from .conftest import ROOT, composed, leave_blank
from .test_evaluation import ATTACK, PGD, QUICK

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def evaluate_all(trained, directory, logger):
    """Both twins under several attacks, one of them in a directory whose name a browser could take for a tag."""
    odd = directory / "<script>alert(1)</script>"  # in a path, two directories
    shutil.copytree(trained.directory / "frobenius" / "checkpoints", odd / "checkpoints")
    shutil.copytree(trained.directory / "vanilla" / "checkpoints", directory / "vanilla" / "checkpoints")
    evaluate(
        composed(
            "evaluate",
            "attack=[fgsm,pgd_linf,transfer,pgd_l2,uniform_noise,gaussian_noise]",
            *[f"attack.{name}.steps=4" for name in ("pgd_linf", "transfer", "pgd_l2")],
            *[f"attack.{name}.eps=[0.1,0.3]" for name in ("fgsm", "pgd_linf", "transfer", "uniform_noise")],
            "attack.pgd_l2.eps=[0.5,1.5]",
            "limit=20",
            "sanity_images=4",
            "geometry_images=6",
            f"logger={logger}",
            f"checkpoint={directory}",
            f"output_dir={directory}/results",
        )
    )


def results_of(directory):
    """What an evaluation wrote: its directory and its results."""
    return directory, Results.model_validate_json((directory / "robustness.json").read_bytes())


@pytest.fixture(scope="module")
def evaluated(trained, once):
    def undrawn(at):
        with pytest.MonkeyPatch.context() as patched:  # this is made before the fixtures of tests
            leave_blank(patched)
            evaluate_all(trained, at, "csv")

    return results_of(once("evaluated", undrawn)[0] / "results")


@pytest.fixture(scope="module")
def drawn(trained, once):
    return results_of(once("drawn", lambda at: evaluate_all(trained, at, "csv"))[0] / "results")


def test_all_attacks_are_in_the_results(evaluated):
    _, results = evaluated
    assert results.norms == ["linf", "l2", "gaussian"]
    for model in results.models:
        linf, l2, gaussian = model.threats
        assert [a.attack for a in linf.budgets[0].attacks] == ["fgsm", "pgd_linf", "transfer", "uniform_noise"]
        assert [a.attack for a in l2.budgets[0].attacks] == ["pgd_l2"]
        assert [a.attack for a in gaussian.budgets[0].attacks] == ["gaussian_noise"]
        assert sum(c.images for c in model.classes) == 20
        assert sum(c.clean_correct for c in model.classes) == model.clean_correct
        for threat in model.threats:
            for i, budget in enumerate(threat.budgets):
                assert sum(c.robust_correct[threat.norm][i] for c in model.classes) == budget.correct
        assert model.first_order.images <= 6
        assert model.noise[0].sigma == 0
        assert model.noise[0].accuracy == model.clean_accuracy
        assert {row.against for row in model.out_of_distribution} >= {"rotated by 90°", "inverted", "uniform noise"}


def test_the_report_needs_nothing_but_itself_and_escapes_what_it_shows(evaluated):
    directory, results = evaluated
    text = (directory / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert text.index(' class="lead"') < text.index("Sanity checks") < text.index("<h2>Accuracy under attack")
    assert text.count("<details") == text.count("</details>") > 8
    assert text.count('<div class="tile"') > 20
    for model in results.models:
        for check in model.checks:
            assert check.name in text
    assert not (directory / "progress").exists()


def table(run, name):
    """The rows of a W&B table, as dicts."""
    (file,) = (run / "files" / "media" / "table").glob(f"{name}_*.table.json")
    stored = json.loads(file.read_text())
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]


@pytest.mark.slow
def test_wandb_has_every_panel_of_the_report(trained, tmp_path):
    evaluate_all(trained, tmp_path, "wandb")
    directory, results = results_of(tmp_path / "results")
    (offline,) = (directory / "wandb").glob("offline-run-*")
    records = wandb_records.read_records(offline)
    logged = {key.removesuffix("/_type") for row in wandb_records.history(records) for key in row}
    budgets = [(threat.norm, budget) for threat in results.models[0].threats for budget in threat.budgets]
    charts = {"clean"} | {f"{norm}_{budget.eps:g}".replace(".", "_") for norm, budget in budgets}
    assert logged >= {f"classes/{name}_table" for name in charts}
    by_class = table(offline, "classes/robust")
    for model in results.models:
        for threat in model.threats:
            for i, budget in enumerate(threat.budgets):
                found = [
                    (row["class"], row["images"], row["accuracy"])
                    for row in by_class
                    if (row["model"], row["norm"], row["eps"]) == (model.name, threat.norm, budget.eps)
                ]
                assert found == [
                    (c.label, c.images, c.robust_correct[threat.norm][i] / c.images) for c in model.classes if c.images
                ]
    conditions = table(offline, "first_order/conditions")
    assert conditions == [
        {"model": model.name} | condition.model_dump()
        for model in results.models
        for condition in model.first_order.conditions
    ]
    with (directory / "images.csv").open() as file:
        images = [row for row in csv.DictReader(file) if row["name"] == results.models[1].name]
    points = table(offline, f"first_order/scatter_{results.models[1].name}_table")
    known = [row for row in images if row["smallest_known_l2"]]
    assert 0 < len(points) <= len(known)
    for point in points:
        row = images[point["image"]]
        assert point["predicted"] == pytest.approx(float(row["predicted_l2"]), rel=1e-5)
        assert 10 ** point["log10_found"] == pytest.approx(float(row["smallest_known_l2"]), rel=1e-4)
    summary = wandb_records.summary(records)
    first, second = (model.seconds_per_epoch for model in results.models)
    assert summary[f"training/{results.models[1].name}/cost_over_first"] == second / first
    assert (
        summary[f"robust_accuracy_linf/{results.models[1].name}/0_1"]
        == results.models[1].threats[0].budgets[0].robust_accuracy
    )


UNMET = ["attack=[fgsm,pgd_linf]", "attack.fgsm.eps=[0.1]", "attack.pgd_linf.eps=[0.1,0.5]", *QUICK, "limit=5"]
UNMET.append(f"checkpoint={ROOT}/docs/results/checkpoints/note_vanilla.safetensors")


def test_a_budget_that_not_every_attack_met_is_told_in_report_and_table(tmp_path, capsys):
    evaluate(composed("evaluate", *UNMET, f"output_dir={tmp_path}/r", "logger=csv"))
    text, printed = (tmp_path / "r" / "report.html").read_text(), capsys.readouterr().out
    for shown in (text, printed):
        assert "ε = 0.5*" in shown
        assert "ε = 0.1*" not in shown
        assert "* ε = 0.5 without fgsm" in shown


@pytest.mark.slow
def test_a_budget_that_not_every_attack_met_is_told_in_wandb(tmp_path):
    evaluate(composed("evaluate", *UNMET, f"output_dir={tmp_path}/r"))
    (offline,) = (tmp_path / "r" / "wandb").glob("offline-run-*")
    drawn = [
        json.loads(item.value_json)["panel_config"]["stringSettings"]
        for record in wandb_records.read_records(offline)
        for item in record.config.update
        if "robustness/curve_linf" in item.nested_key
    ]
    assert [settings["title"] for settings in drawn] == ["Accuracy under attack, ℓ∞; ε = 0.5 without fgsm"]


@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("report", ["evaluation", "comparison"])
def test_the_report_is_drawn_by_a_browser_without_a_network(report, drawn, tmp_path):
    directory, _ = drawn
    if report == "comparison":
        compare([directory], tmp_path / "compared")
        directory = tmp_path / "compared"
    shot = tmp_path / "shot.png"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1150,12000"]
    arguments += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no name has an address
    arguments += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", f"file://{directory}/report.html"]
    subprocess.run([BROWSER, *arguments], capture_output=True, timeout=120, check=True)
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)

    def shown(red, green, blue):
        return int((np.abs(pixels - np.array([red, green, blue])).max(-1) <= 2).sum())

    assert shown(0xD5, 0xEF, 0xE4) > 500  # the badge of a check that passed
    assert shown(0x00, 0x72, 0xB2) > 500  # the first model's line, in the embedded figures
    assert shown(0x7F, 0x3B, 0x08) > 500  # the largest difference, in the pictures of adversarial examples


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(after, trained, tmp_path, monkeypatch):
    def run(directory, *overrides):
        return evaluate(
            composed(
                "evaluate",
                *ATTACK,
                "attack.pgd_linf.batch_size=10",
                f"checkpoint=[{trained.directory}/vanilla,{trained.directory}/frobenius]",
                f"output_dir={directory}",
                "logger=csv",
                *overrides,
            )
        )

    met = []
    bar = journal_of.Bars.__call__
    with monkeypatch.context() as patch:
        patch.setattr(journal_of.Bars, "__call__", lambda self, *arguments: met.append(arguments))
        whole = run(tmp_path / "whole")
    batches = len([arguments for arguments in met if arguments[2]])
    met.clear()
    monkeypatch.setattr(journal_of.FileJournal, "SECONDS", 0.0)

    def interrupted(self, *arguments):
        if arguments[2]:  # images are met
            met.append((self.name, *arguments))
            if len(met) == after + 1:
                raise KeyboardInterrupt
        bar(self, *arguments)

    monkeypatch.setattr(journal_of.Bars, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume=true"):
        run(tmp_path / "parted")
    with pytest.raises(UserError, match="already holds a result"):
        run(tmp_path / "parted")
    with pytest.raises(UserError, match="other options"):
        run(tmp_path / "parted", "seed=5", "resume=true")
    first = len(met)
    resumed = run(tmp_path / "parted", "resume=true")
    assert resumed == whole
    anew = [batch for batch in met[first:] if batch not in met[:after]]
    assert len(met) - first - len(anew) <= 1  # where it goes on is shown
    assert len(anew) + after == batches
    written = (tmp_path / "parted" / "robustness.json").stat().st_mtime_ns
    assert run(tmp_path / "parted", "resume=true") == whole
    assert (tmp_path / "parted" / "robustness.json").stat().st_mtime_ns == written, "what is finished is left as it is"


@pytest.mark.slow
def test_what_was_made_of_the_first_model_is_not_made_again(trained, tmp_path, monkeypatch):
    both = f"checkpoint=[{trained.directory}/vanilla,{trained.directory}/frobenius]"
    options = [*ATTACK, both, "logger=csv", "geometry_images=20"]
    whole = evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/whole"))
    made = []

    def counting(place, name):
        make = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **options: made.append(name) or make(*args, **options))

    counting(measure, "_checks")
    counting(measure.first_order, "smallest_perturbations")

    def interrupted(self, *arguments):
        if self.name == "frobenius":
            raise KeyboardInterrupt
        bar(self, *arguments)

    bar = journal_of.Bars.__call__
    with monkeypatch.context() as patch:
        patch.setattr(journal_of.Bars, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resume=true"):
            evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/run"))
    assert made == ["_checks", "smallest_perturbations"]
    assert evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/run", "resume=true")) == whole
    assert made == 2 * ["_checks", "smallest_perturbations"]
    ours, theirs = ((tmp_path / name / "images.csv").read_bytes() for name in ("run", "whole"))
    assert ours == theirs


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_with_its_wandb_run(trained, tmp_path, monkeypatch):
    options = [*ATTACK, f"checkpoint={trained.directory}/vanilla", f"output_dir={tmp_path}/run"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal_of.Bars, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resume=true"):
            evaluate(composed("evaluate", *options))
    time.sleep(1)  # W&B names directories by the second
    evaluate(composed("evaluate", *options, "resume=true"))
    places = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    runs = [wandb_records.read_records(place) for place in places]
    assert [wandb_records.exit_code(records) for records in runs] == [1, 0]
    assert len({record.run.run_id for records in runs for record in records} - {""}) == 1


def test_progress_on_another_device_is_not_taken(trained, monkeypatch):
    """There batches are of another size, and a batch's number would not say which images it held."""
    cfg = composed("evaluate", *QUICK, f"checkpoint={trained.directory}/vanilla")
    asked = read_evaluation(cfg)
    (model,) = load_classifiers([load_checkpoint(trained.directory / "vanilla" / "model.safetensors")], asked)
    here = journal_of.identity_of(model, torch.zeros(1), asked.attacks, asked)
    monkeypatch.setattr(journal_of, "device", lambda: torch.device("cuda"))
    assert journal_of.identity_of(model, torch.zeros(1), asked.attacks, asked) == here | {"device": "cuda"} != here


def test_progress_with_another_source_is_not_taken(tmp_path, monkeypatch):
    """A file of the same name, of other weights, between the interruption and the resumption."""
    checkpoints, source = ROOT / "docs" / "results" / "checkpoints", tmp_path / "source.safetensors"
    options = [*QUICK, "limit=10", "logger=csv", f"output_dir={tmp_path}/r", "resume=true"]
    options += [f"checkpoint={checkpoints}/note_vanilla.safetensors", "attack=transfer"]
    options += [f"attack.transfer.source={source}", "attack.transfer.batch_size=5", "attack.transfer.steps=2"]
    monkeypatch.setattr(journal_of.FileJournal, "SECONDS", 0.0)
    bar = journal_of.Bars.__call__

    def interrupted(self, *arguments):
        if arguments[2] > 5:
            raise KeyboardInterrupt
        bar(self, *arguments)

    shutil.copy(checkpoints / "note_regularized.safetensors", source)
    with monkeypatch.context() as patch:
        patch.setattr(journal_of.Bars, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resume=true"):
            evaluate(composed("evaluate", *options))
    shutil.copy(checkpoints / "note_vanilla.safetensors", source)
    with pytest.raises(UserError, match="another evaluation"):
        evaluate(composed("evaluate", *options))
    shutil.copy(checkpoints / "note_regularized.safetensors", source)
    assert evaluate(composed("evaluate", *options)).models[0].images == 10


def test_a_finished_evaluation_is_returned_for_the_weights_that_it_is_of(tmp_path):
    """Other weights in the same place are as little taken for them as in an unfinished one."""
    checkpoints, evaluated = ROOT / "docs" / "results" / "checkpoints", tmp_path / "models"
    evaluated.mkdir()
    options = [*QUICK, "attack=fgsm", "limit=5", "logger=csv", f"checkpoint={evaluated}", f"output_dir={tmp_path}/r"]
    shutil.copy(checkpoints / "note_vanilla.safetensors", evaluated / "a.safetensors")
    results = evaluate(composed("evaluate", *options))
    assert evaluate(composed("evaluate", *options, "resume=true")) == results
    shutil.copy(checkpoints / "note_regularized.safetensors", evaluated / "b.safetensors")
    with pytest.raises(UserError, match=r"robustness.json is the evaluation of other weights .*hydra.run.dir"):
        evaluate(composed("evaluate", *options, "resume=true"))  # of two now
    (evaluated / "b.safetensors").replace(evaluated / "a.safetensors")
    with pytest.raises(UserError, match=r"robustness.json is the evaluation of other weights .*hydra.run.dir"):
        evaluate(composed("evaluate", *options, "resume=true"))
    shutil.copy(checkpoints / "note_vanilla.safetensors", evaluated / "a.safetensors")
    assert evaluate(composed("evaluate", *options, "resume=true")) == results


@pytest.mark.slow
def test_evaluation_runs_name_the_run_that_trained_their_models(logged, tmp_path):
    results = evaluate(
        composed("evaluate", *ATTACK, f"checkpoint={logged.directory}/vanilla", f"output_dir={tmp_path}/r")
    )
    trainer = json.loads((logged.directory / "vanilla" / "summary.json").read_text())["wandb"]
    (offline,) = (logged.directory / "vanilla" / "wandb").glob("offline-run-*")
    assert trainer.split("/")[-1] == offline.name.rpartition("-")[-1]
    assert results.models[0].wandb == trainer
    (evaluation_run,) = (tmp_path / "r" / "wandb").glob("offline-run-*")
    record = next(r.run for r in wandb_records.read_records(evaluation_run) if r.HasField("run"))
    assert trainer in record.notes
    noted = {item.key: item.value_json for item in record.config.update}
    assert json.loads(noted["training_runs"]) == {"vanilla": trainer}
    stored = torch.load(logged.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["wandb"] = "team/project/run1"  # as if it had been trained online
    torch.save(stored, tmp_path / "online.ckpt")
    evaluate(composed("evaluate", *ATTACK, f"checkpoint={tmp_path}/online.ckpt", f"output_dir={tmp_path}/online"))
    (evaluation_run,) = (tmp_path / "online" / "wandb").glob("offline-run-*")
    record = next(r.run for r in wandb_records.read_records(evaluation_run) if r.HasField("run"))
    assert "https://wandb.ai/team/project/runs/run1" in record.notes
    report = (tmp_path / "online" / "report.html").read_text()
    assert '<a href="https://wandb.ai/team/project/runs/run1">team/project/run1</a>' in report
    assert "<a " not in (tmp_path / "r" / "report.html").read_text()  # no entity, no address


def test_a_transfer_needs_another_model(trained, tmp_path, capsys):
    options = [*QUICK, "limit=10", "logger=csv", f"checkpoint={trained.directory}/vanilla", f"output_dir={tmp_path}/r"]
    with pytest.raises(UserError, match="no other model to transfer"):
        evaluate(composed("evaluate", "attack=transfer", *options))
    with pytest.raises(UserError, match="no such file"):
        evaluate(composed("evaluate", "attack=transfer", "attack.transfer.source=nowhere", *options))
    assert not (tmp_path / "r").exists()
    results = evaluate(composed("evaluate", "attack=[fgsm,transfer]", *options))
    assert list(results.attacks) == ["fgsm"]
    assert "transfer is left out" in capsys.readouterr().out
    named = f"attack.transfer.source={trained.directory}/frobenius"
    options[-1] += "2"
    (model,) = evaluate(composed("evaluate", "attack=transfer", "attack.transfer.eps=[0.3]", named, *options)).models
    assert model.threats[0].budgets[0].attacks[0].broken > 0


def test_seeds_are_put_together_with_their_spread(trained, tmp_path, capsys, undrawn):
    for seed, name in ((0, "vanilla"), (1, "frobenius")):  # as if the one were the other with another seed
        stored = torch.load(trained.directory / name / "checkpoints" / "last.ckpt", weights_only=True)
        stored["jacobian_robust"]["config"] |= {"seed": seed, "regularizer": None}
        torch.save(stored, tmp_path / f"vanilla_seed{seed}.ckpt")
    options = [*ATTACK, "limit=40", "logger=csv", f"checkpoint={tmp_path}", f"output_dir={tmp_path}/r"]
    results = evaluate(composed("evaluate", *options))
    (group,) = groups(results.models)
    assert (group.name, group.seeds) == ("vanilla", [0, 1])
    assert group.clean[1] > 0
    line = f"{100 * group.clean[0]:.1f} ± {100 * group.clean[1]:.1f}%"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "r" / "report.html").read_text()
    (axes,) = undrawn[tmp_path / "r" / "seeds_linf.png"].axes
    (drawn,) = axes.containers
    budgets, means, _ = zip(*group.robust["linf"], strict=True)
    assert list(drawn.lines[0].get_xdata()) == list(budgets)
    assert list(drawn.lines[0].get_ydata()) == pytest.approx(means)


def test_evaluations_that_measured_less_are_compared_by_what_they_have(trained, tmp_path):
    options = [*ATTACK, "limit=10", "logger=csv"]
    for name, more in (("vanilla", []), ("frobenius", ["geometry_images=10", "reliability=true"])):
        place = [f"checkpoint={trained.directory}/{name}", f"output_dir={tmp_path}/{name}"]
        evaluate(composed("evaluate", *options, *more, *place))
    compare([tmp_path / "vanilla", tmp_path / "frobenius"], tmp_path / "both")
    text = (tmp_path / "both" / "report.html").read_text()
    for figure in ("first_order", "calibration", "noise"):
        assert f'id="{figure}"' in text
    for heading in ("What the geometry predicts", "Beyond adversaries", "Telling images of another kind"):
        part = text.split(heading)[1].split("</table>")[0]
        assert "<td>frobenius</td>" in part
        assert "<td>vanilla</td>" not in part


def test_fashion_mnist_is_looked_at_where_its_files_are(trained, tmp_path):
    shutil.copytree(ROOT / "data" / "MNIST", tmp_path / "data" / "MNIST")
    options = ["data=mnist", f"data.root={tmp_path}/data", "logger=csv", f"checkpoint={trained.directory}/vanilla"]
    options.append("limit=10")

    def against(name):
        report = evaluate(composed("evaluate", *ATTACK, *options, "reliability=true", f"output_dir={tmp_path}/{name}"))
        return [row.against for row in report.models[0].out_of_distribution]

    assert not any(name.startswith("FashionMNIST") for name in against("without"))
    shutil.copytree(ROOT / "data" / "MNIST", tmp_path / "data" / "FashionMNIST")  # files of the same names and shapes
    # They are not the original files, so the results name their hash.
    assert re.fullmatch(r"FashionMNIST \([0-9a-f]{12}\)", against("with")[-1])
    # Bare files are of one set: the same ones are not the other.
    options[1] = f"data.root={tmp_path}/data/MNIST/raw"
    assert not any(name.startswith("FashionMNIST") for name in against("bare"))


@pytest.mark.slow
def test_a_comparison_is_logged_to_wandb(trained, tmp_path):
    for name in ("vanilla", "frobenius"):
        place = [f"checkpoint={trained.directory}/{name}", f"output_dir={tmp_path}/{name}", "logger=csv"]
        evaluate(composed("evaluate", *ATTACK, *place))
    compare([tmp_path / "vanilla", tmp_path / "frobenius"], tmp_path / "both", logger=WandbOptions())
    (offline,) = (tmp_path / "both" / "wandb").glob("offline-run-*")
    records = wandb_records.read_records(offline)
    assert wandb_records.exit_code(records) == 0
    logged = {key for row in wandb_records.history(records) for key in row}
    assert {"report/_type", "robustness/table/_type", "robustness/accuracy_linf/frobenius"} <= logged


def lines_of(figure):
    """The heights of the lines of a figure by their names."""
    return {line.get_label(): [float(y) for y in line.get_ydata()] for axes in figure.axes for line in axes.lines}


def test_evaluations_made_apart_are_compared_as_if_made_together(trained, tmp_path, capsys, undrawn):
    def run(name, checkpoint, *overrides):
        options = [f"checkpoint={checkpoint}", f"output_dir={tmp_path}/{name}", "logger=csv", *overrides]
        return evaluate(composed("evaluate", *ATTACK, *options))

    together = run("together", f"[{trained.directory}/vanilla,{trained.directory}/frobenius]")
    for name in ("vanilla", "frobenius"):
        run(name, trained.directory / name)
    capsys.readouterr()
    places = [tmp_path / "vanilla", tmp_path / "frobenius"]
    assert compare(places, tmp_path / "both") == together
    assert "worst case over pgd_linf" in capsys.readouterr().out
    called = dict(zip(("vanilla", "frobenius"), ("undefended", "Frobenius penalty"), strict=True))
    assert lines_of(undrawn[tmp_path / "both" / "accuracy_linf.png"]) == {
        called[model.name]: [budget.robust_accuracy for budget in model.threats[0].budgets] for model in together.models
    }
    assert "frobenius" in (tmp_path / "both" / "report.html").read_text()
    with pytest.raises(UserError, match="already holds a result"):
        compare(places, tmp_path / "both")
    with pytest.raises(UserError, match=r"vanilla is named twice"):
        compare([tmp_path / "vanilla", tmp_path / "vanilla"], tmp_path / "none")
    elsewhere = Results.model_validate_json((tmp_path / "frobenius" / "robustness.json").read_text())
    (model,) = elsewhere.models
    elsewhere = elsewhere.model_copy(update={"models": [model.model_copy(update={"data": "FashionMNIST test"})]})
    (tmp_path / "fashion.json").write_text(elsewhere.model_dump_json())
    with pytest.raises(UserError, match=r"fashion is of FashionMNIST test, .*vanilla of MNIST test"):
        compare([tmp_path / "vanilla", tmp_path / "fashion.json"], tmp_path / "none")
    run("other", trained.directory / "vanilla", "seed=1", "limit=10")
    with pytest.raises(UserError, match=r"other was evaluated otherwise than .*vanilla: seed differ"):
        compare([tmp_path / "vanilla", tmp_path / "other"], tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no robustness.json"):
        compare([tmp_path / "empty"], tmp_path / "none")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "robustness.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="no evaluation of this version"):
        compare([tmp_path / "old"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.drawn("examples_linf.png")
def test_a_comparison_shows_the_adversarial_examples_of_the_evaluations(trained, tmp_path):
    def shown(*places):
        out = tmp_path / f"compared{len(list(tmp_path.iterdir()))}"
        compare([tmp_path / place for place in places], out)
        text = (out / "report.html").read_text()
        part = text.split("<h2>Adversarial examples</h2>")[1].split("<h2>")[0]
        pictures = re.findall(r"<h3>(.*)</h3>\n<figure[^>]*><img [^>]*base64,([^\"]*)", part)
        return {name: base64.b64decode(png) for name, png in pictures}, part

    options = [*PGD, "limit=10", "sanity_images=0", "geometry_images=4", "reliability=true", "logger=csv"]
    for name in ("vanilla", "frobenius"):
        run = [f"checkpoint={trained.directory}/{name}", f"output_dir={tmp_path}/{name}"]
        evaluate(composed("evaluate", *options, *run))
    pictures, _ = shown("vanilla", "frobenius")
    files = {f"{name}, ℓ∞": (tmp_path / name / "examples_linf.png").read_bytes() for name in ("vanilla", "frobenius")}
    assert pictures == files
    (out,) = tmp_path.glob("compared*")
    text = (out / "report.html").read_text()
    for figure in ("accuracy_linf", "first_order", "calibration", "noise", "classes_vanilla", "classes_frobenius"):
        assert f'<figure id="{figure}">' in text
    (tmp_path / "vanilla" / "examples_linf.png").unlink()  # its report has it
    pictures, _ = shown("vanilla", "frobenius")
    assert pictures.keys() == files.keys()
    assert pictures["frobenius, ℓ∞"] == files["frobenius, ℓ∞"]
    assert pictures["vanilla, ℓ∞"] == files["vanilla, ℓ∞"]
    (tmp_path / "vanilla" / "report.html").unlink()
    pictures, part = shown("vanilla", "frobenius")
    assert pictures.keys() == {"frobenius, ℓ∞"}
    assert 'Its evaluation, <a href="../vanilla">../vanilla</a>, holds no picture' in part


def test_a_sweep_is_gathered_and_drawn_over_what_was_varied(trained, tmp_path, capsys, undrawn):
    for value, seed in ((0.1, 0), (0.5, 0), (0.5, 1)):  # as if a sweep had left them
        run = tmp_path / "sweep" / f"eta.value-{value}+seed-{seed}"
        shutil.copytree(trained.directory / "frobenius", run, ignore=shutil.ignore_patterns("wandb"))
        config = OmegaConf.load(run / "config.yaml")
        config.eta.value, config.seed = value, seed
        OmegaConf.save(config, run / "config.yaml")
        options = [f"checkpoint={run}", f"output_dir={run}/evaluation", "limit=10", "logger=csv"]
        evaluate(composed("evaluate", *ATTACK, *options))
    failed = tmp_path / "sweep" / "eta.value-0.9+seed-0"
    failed.mkdir()
    (failed / "config.yaml").write_text("seed: 0")
    capsys.readouterr()
    results = compare([tmp_path / "sweep"], tmp_path / "all")
    assert "1 of 4 runs were not evaluated and are left out: eta.value-0.9+seed-0" in capsys.readouterr().out
    names = ["eta.value=0.1 seed=0", "eta.value=0.5 seed=0", "eta.value=0.5 seed=1"]
    assert sorted(model.name for model in results.models) == names
    with (tmp_path / "all" / "runs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["eta.value"], row["seed"]) for row in table] == [("0.1", "0"), ("0.5", "0"), ("0.5", "1")]
    for row, model in zip(table, results.models, strict=True):
        assert float(row["clean_accuracy"]) == model.clean_accuracy
        assert float(row["robust_accuracy_linf_0.1"]) == model.threats[0].budgets[-1].robust_accuracy
    drawn = undrawn[tmp_path / "all" / "trade_off.png"]
    shown = {float(x) for axes in drawn.axes for line in axes.lines for x in line.get_xdata()}
    assert shown >= {0.1, 0.5}, "the values of eta.value"
    assert 'id="trade_off"' in (tmp_path / "all" / "report.html").read_text()
    with pytest.raises(UserError, match=r"--over eta.max: give a number that varies over the runs; one of eta.value"):
        compare([tmp_path / "sweep"], tmp_path / "none", over="eta.max")
