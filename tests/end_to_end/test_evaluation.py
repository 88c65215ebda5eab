import csv
import json
import pickle
import shutil

import pytest
import torch

from jacobian_robust import attacks
from jacobian_robust.checkpoints import find_checkpoints, load_checkpoint
from jacobian_robust.data import FashionMNISTDataModule, MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.models import LeNet
from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust.robustness import sanity
from jacobian_robust.robustness.evaluate import evaluate_robustness
from jacobian_robust.robustness.sanity import balls
from jacobian_robust.robustness.sanity.balls import QUERIES
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.simplifications.schema import Simplifications

from . import wandb_records
from .conftest import FEW, ROOT, colours, composed, shows

QUICK = ["limit=20", "sanity_images=0", "geometry_images=0", "reliability=false"]
PGD = ["attack.pgd_linf.steps=5", "attack.pgd_linf.step_size=0.02", "attack.pgd_linf.eps=[0,0.05,0.1]"]
ATTACK = [*PGD, *QUICK]


def run(tmp_path, *overrides):
    logger = () if any(option.startswith("logger=") for option in overrides) else ("logger=csv",)
    return evaluate(composed("evaluate", *ATTACK, *logger, f"output_dir={tmp_path}/results", *overrides))


@pytest.mark.drawn("accuracy_linf.png", "examples_linf.png", "classes.png")
def test_a_real_attack_is_reported_in_full(trained, tmp_path):
    report = run(
        tmp_path, f"checkpoint={trained.directory}/vanilla", "attack.pgd_linf.restarts=2", "seed=3", "limit=60"
    )
    results = tmp_path / "results"
    assert Results.model_validate_json((results / "robustness.json").read_text()) == report
    (model,) = report.models
    (threat,) = model.threats
    zero, small, large = threat.budgets
    assert model.images == 60
    assert zero.correct == zero.attacked == model.clean_correct
    assert zero.correct >= small.correct >= large.correct
    assert large.correct < model.clean_correct
    assert large.share_of_attacked == large.correct / large.attacked
    assert large.robust_accuracy == large.correct / 60
    assert report.attacks["pgd_linf"]["restarts"] == 2
    assert report.seed == 3
    assert model.data == "MNIST test"
    assert report.versions["torchattacks"] == "3.5.1"
    with (results / "robustness.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["correct"]) for row in table] == [b.correct for b in model.threats[0].budgets]
    assert {row["sha256"] for row in table} == {model.sha256}
    assert {json.loads(row["parameters"])["steps"] for row in table} == {5}
    assert {float(row["seconds_per_epoch"]) for row in table} == {model.seconds_per_epoch}
    with (results / "images.csv").open() as file:
        images = list(csv.DictReader(file))
    assert [int(row["image"]) for row in images] == list(range(60))
    assert sum(row["label"] == row["predicted"] for row in images) == model.clean_correct
    for budget in model.threats[0].budgets:
        withstood = [row for row in images if row[f"robust_linf_{budget.eps:g}"] == "1"]
        assert len(withstood) == budget.correct
        assert all(row["label"] == row["predicted"] for row in withstood)
    for picture in ("accuracy_linf.png", "examples_linf.png", "classes.png"):
        assert colours(results / picture) > 20
    assert shows(results / "accuracy_linf.png", PALETTE[0]), "the model's line"


def test_a_new_attack_is_one_file(trained, tmp_path, door):
    (tmp_path / "mine/attack").mkdir(parents=True)
    (tmp_path / "mine/attack/eot.yaml").write_text(
        "# @package attack.eot\n_target_: jacobian_robust.attacks.Library\nattack: EOTPGD\nnorm: linf\n"
        "eps: [0.1, 0.2]\narguments: {steps: 5, alpha: 0.05, eot_iter: 2}\n"
    )
    options = ["limit=20", *QUICK[1:], "logger=csv", f"hydra.run.dir={tmp_path}/results"]
    done = door(
        "evaluate", f"--config-dir={tmp_path}/mine", f"checkpoint={trained.directory}/vanilla", "attack=eot", *options
    )
    assert done.status == 0, done.stderr
    report = Results.model_validate_json((tmp_path / "results/robustness.json").read_text())
    assert [budget.eps for budget in report.models[0].threats[0].budgets] == [0.1, 0.2]
    assert report.attacks["eot"]["arguments"] == {"steps": 5, "alpha": 0.05, "eot_iter": 2}


def test_geometry_can_be_asked_for_at_all_images(trained, tmp_path):
    report = run(tmp_path, f"checkpoint={trained.directory}/vanilla", "limit=3", "geometry_images=null")
    assert report.models[0].first_order.images == report.models[0].clean_correct


@pytest.mark.slow
def test_two_processes_find_what_one_does_byte_for_byte(tmp_path):
    checkpoint = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    options = [*PGD, "limit=150", "sanity_images=10", "geometry_images=10", "reliability=false", "logger=csv"]
    for processes in (1, 2):
        output = f"output_dir={tmp_path}/{processes}"
        evaluate(composed("evaluate", f"checkpoint={checkpoint}", *options, output, f"processes={processes}"))
    one, two = tmp_path / "1", tmp_path / "2"
    for name in ("robustness.json", "robustness.csv", "images.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    (model,) = Results.model_validate_json((two / "robustness.json").read_bytes()).models
    assert 0 < model.threats[0].budgets[-1].correct < model.clean_correct


@pytest.mark.parametrize("queries", [FEW, pytest.param(QUERIES, marks=pytest.mark.slow)])
def test_every_evaluation_is_checked_and_the_verdict_stands_above_the_figures(
    queries, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(balls, "QUERIES", queries)
    places = [f"{trained.directory}/{name}" for name in ("vanilla", "frobenius")]
    report = run(tmp_path, f"checkpoint=[{','.join(places)}]", "sanity_images=6")
    printed = capsys.readouterr().out
    for model in report.models:
        assert [check.name for check in model.checks][:3] == ["evaluation mode", "deterministic", "logits"]
        status = {check.name: check.status for check in model.checks}
        assert status["unseen images"] == status["transfer"] == status["deterministic"] == "pass"
        assert model.verdict in ("pass", "warn", "fail")
        assert printed.index(f"{model.name}: sanity {model.verdict}") < printed.index("worst case over pgd_linf")


def test_one_model_alone_is_checked_with_the_projects_examples(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sanity, "BALL_CHECKS", {"transfer": sanity.BALL_CHECKS["transfer"]})  # the others attack too

    def alone(number: int, *options: str) -> bool:
        asked = [*options, "attack=fgsm", "attack.fgsm.eps=[0.01]", *QUICK, "limit=6", "sanity_images=6", "logger=csv"]
        models = evaluate(composed("evaluate", *asked, f"output_dir={tmp_path}/{number}")).models
        (check,) = (check for check in models[0].checks if check.name == "transfer")
        return check.status == "warn" and "there is no other model" in check.why

    own = f"checkpoint={trained.directory}/vanilla"
    committed = "docs/results/checkpoints/note_vanilla.safetensors"
    assert not alone(0, own)
    assert alone(1, own, "sanity_source=null")
    assert not alone(2, f"checkpoint={ROOT / committed}")  # the list's second is another
    weights = load_checkpoint(ROOT / committed).state_dict
    torch.save(weights, tmp_path / "same.pt")
    same = [f"checkpoint={tmp_path}/same.pt", "model=lenet", "data=mnist"]
    assert alone(3, *same, f"sanity_source={committed}")  # another file, the same network
    assert alone(4, own, f"sanity_source={ROOT}/docs/toy")  # of other data
    assert alone(6, own, "sanity_source=[nowhere]")  # of several, those that are there: a wheel has none of the list
    with pytest.raises(UserError, match="sanity_source=nowhere: no such file"):
        evaluate(composed("evaluate", own, *PGD, "sanity_source=nowhere", f"output_dir={tmp_path}/5"))
    torch.save(LeNet().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="does not say what it was trained on"):
        evaluate(composed("evaluate", own, *PGD, f"sanity_source={tmp_path}/weights.pt", f"output_dir={tmp_path}/5"))


def test_training_images_that_are_not_on_this_machine_stop_no_evaluation(trained, tmp_path):
    stored = torch.load(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["config"]["data"]["root"] = str(tmp_path / "elsewhere")
    torch.save(stored, tmp_path / "moved.ckpt")
    report = run(tmp_path, f"checkpoint={tmp_path}/moved.ckpt", "data=mnist", "limit=5", "sanity_images=5")
    (check,) = (check for check in report.models[0].checks if check.name == "unseen images")
    assert check.status == "skip"


@pytest.mark.slow
def test_wandb_run_of_an_evaluation_holds_table_curve_and_images(trained, tmp_path):
    report = run(tmp_path, f"checkpoint={trained.directory}/vanilla", "logger=wandb", "sanity_images=20")
    (offline,) = (tmp_path / "results" / "wandb").glob("offline-run-*")
    records = wandb_records.read_records(offline)
    assert next(record.run.job_type for record in records if record.HasField("run")) == "evaluation"
    logged = {key: value for row in wandb_records.history(records) for key, value in row.items()}
    assert logged["robustness/table/_type"] == "table-file"
    assert "sanity/checks/_type" in logged
    assert logged["figures/examples_linf/_type"] == "image-file"
    assert any(key.startswith("robustness/curve_linf") for key in logged)
    curve = [
        (row["robustness/eps_linf"], row["robustness/accuracy_linf/vanilla"])
        for row in wandb_records.history(records)
        if "robustness/eps_linf" in row
    ]
    (model,) = report.models
    assert curve == [(b.eps, b.robust_accuracy) for b in model.threats[0].budgets]  # the first budget is 0
    assert curve[0] == (0, model.clean_accuracy)
    assert wandb_records.summary(records)["training/vanilla/seconds_per_epoch"] == model.seconds_per_epoch
    assert wandb_records.exit_code(records) == 0


def test_the_held_out_images_can_be_attacked_to_choose_settings_by(trained, tmp_path):
    report = run(tmp_path, f"checkpoint={trained.directory}/vanilla", "split=validation", "limit=40")
    (model,) = report.models
    assert (report.split, model.data) == ("validation", "MNIST validation (200 held out by split_seed 0)")
    checkpoint = load_checkpoint(trained.directory / "vanilla" / "checkpoints" / "last.ckpt")
    datamodule = checkpoint.datamodule()
    datamodule.setup("validate")
    images, labels = datamodule.split("validation").first(40)
    with torch.no_grad():
        correct = int((checkpoint.model()(images).argmax(-1) == labels).sum())
    assert model.clean_correct == correct


def test_checkpoints_that_hold_out_other_images_share_no_table(trained, tmp_path, monkeypatch):
    stored = torch.load(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["config"]["data"]["validation_size"] = 100
    torch.save(stored, tmp_path / "other.ckpt")
    both = f"checkpoint=[{trained.directory}/vanilla,{tmp_path}/other.ckpt]"
    with pytest.raises(UserError, match="validation images differ"):
        run(tmp_path, both, "split=validation")
    stored["jacobian_robust"]["config"]["data"]["_target_"] = "jacobian_robust.data.FashionMNISTDataModule"
    monkeypatch.setattr(FashionMNISTDataModule, "prepare_data", lambda self: None)  # its files are not needed to refuse
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="test images differ"):
        run(tmp_path, both)
    assert not (tmp_path / "results").exists()


def test_each_attack_has_a_bar_with_what_stands(trained, tmp_path, capsys):
    report = run(tmp_path, f"checkpoint={trained.directory}/vanilla", "logger=csv", "attack.pgd_linf.eps=[0.05,0.1]")
    bars = capsys.readouterr().err.replace("\r", "\n").splitlines()
    for budget in report.models[0].threats[0].budgets:
        shown = [bar for bar in bars if bar.startswith(f"pgd_linf ε={budget.eps:g} on vanilla")]
        assert f"robust={budget.correct}]" in shown[-1]


def test_the_bar_of_an_attack_is_there_before_its_first_batch_is_done(trained, tmp_path, capsys, monkeypatch):
    shown = []
    attack = attacks.PGD._library_attack

    def showing(self, *arguments):
        shown.append(capsys.readouterr().err.splitlines()[-1].rpartition("\r")[-1])
        return attack(self, *arguments)

    monkeypatch.setattr(attacks.PGD, "_library_attack", showing)
    run(tmp_path, f"checkpoint={trained.directory}/vanilla", "logger=csv", "attack.pgd_linf.eps=[0.05,0.1]", "limit=9")
    assert shown[0].startswith("pgd_linf ε=0.05 on vanilla:   0%")
    assert shown[1].startswith("pgd_linf ε=0.1 on vanilla:   0%")


def test_the_plain_function_counts_what_the_command_counts(tmp_path):
    checkpoint = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    options = ["attack.pgd_linf.eps=[0,0.1]", *QUICK, "limit=10", f"checkpoint={checkpoint}", "logger=csv"]
    [command] = evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/results")).models
    data = MNISTDataModule(root=str(ROOT / "data"), validation_size=0)
    data.setup("test")
    images, labels = data.split("test").first(10)
    model = load_checkpoint(checkpoint).model()
    result = evaluate_robustness(model, images, labels, eps=[0.0, 0.1], sanity_images=0)
    [plain] = result.results.models
    assert plain.threats == command.threats
    assert 0 < plain.threats[0].budgets[-1].correct < plain.clean_correct


def test_the_same_evaluation_twice_gives_the_same_counts(trained, tmp_path):
    first, second = (run(tmp_path / str(i), f"checkpoint={trained.directory}/vanilla") for i in (0, 1))
    assert first.models == second.models


@pytest.mark.parametrize("attack", ["fgsm", "pgd_l2"])
def test_other_attacks_work_by_name(trained, tmp_path, attack):
    report = evaluate(
        composed(
            "evaluate",
            f"attack={attack}",
            f"attack.{attack}.eps=[0.3]",
            *QUICK,
            "limit=10",
            "logger=csv",
            f"checkpoint={trained.directory}/vanilla",
            f"output_dir={tmp_path}/r",
        )
    )
    assert list(report.attacks) == [attack]
    assert not (tmp_path / "r" / "wandb").exists()


def test_a_directory_of_runs_and_a_list_give_one_table(trained, tmp_path, undrawn):
    whole = run(tmp_path / "a", f"checkpoint={trained.directory}")
    listed = run(tmp_path / "b", f"checkpoint=[{trained.directory}/vanilla,{trained.directory}/frobenius]")
    assert [model.name for model in whole.models] == ["vanilla", "frobenius"]
    assert whole.models == listed.models
    for model in whole.models:
        drawn = undrawn[tmp_path / "a" / "results" / f"examples_linf_{model.name}.png"]
        assert sum(len(axes.images) for axes in drawn.axes) >= 3, "images, examples and their differences"


def test_a_checkpoint_is_enough_by_itself(trained, tmp_path):
    alone = tmp_path / "elsewhere" / "model.ckpt"
    alone.parent.mkdir()
    shutil.copy(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", alone)
    report = run(tmp_path, f"checkpoint={alone}")
    original = run(tmp_path / "original", f"checkpoint={trained.directory}/vanilla")
    assert report.models[0].threats == original.models[0].threats


class Payload:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('owned').touch()",))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_malicious_checkpoint_runs_nothing(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil.ckpt cannot be read as tensors and plain values.*trust=true"):
        load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "target",
    ["os.system", "jacobian_robust.models.nn.Linear", "jacobian_robust.models.validate_call", "", "pathlib.Path"],
)
def test_a_checkpoint_cannot_choose_what_is_called(trained, tmp_path, target):
    stored = torch.load(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["config"]["model"] = {"_target_": target}
    torch.save(stored, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="not run on a file's word"):
        load_checkpoint(tmp_path / "odd.ckpt").model()


def test_a_model_named_by_the_user_takes_the_weights(trained, tmp_path):
    stored = torch.load(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["config"]["model"] = {"_target_": "mylab.Net"}
    torch.save(stored, tmp_path / "foreign.ckpt")
    report = run(tmp_path, f"checkpoint={tmp_path}/foreign.ckpt", "model=lenet")
    original = run(tmp_path / "original", f"checkpoint={trained.directory}/vanilla")
    assert report.models[0].threats == original.models[0].threats


def test_checkpoints_are_found_in_files_runs_and_trees(trained):
    vanilla, frobenius = (trained.directory / name / "checkpoints" / "last.ckpt" for name in ("vanilla", "frobenius"))
    assert find_checkpoints([vanilla]) == find_checkpoints([vanilla.parents[1]]) == [vanilla]
    assert find_checkpoints([trained.directory]) == [vanilla, frobenius], "the undefended first"
    assert len(find_checkpoints([vanilla, vanilla.parent / ".." / "checkpoints" / "last.ckpt"])) == 1
    assert find_checkpoints([vanilla, trained.directory]) == [vanilla, frobenius]
    assert find_checkpoints([frobenius, vanilla]) == [frobenius, vanilla], "as they are named"


@pytest.mark.slow
@pytest.mark.drawn("simplifications.png")
def test_the_notes_simplifications_are_measured_on_demand(trained, tmp_path, capsys):
    options = ["attack=pgd_l2", "attack.pgd_l2.steps=4", "attack.pgd_l2.eps=[0.5,3]", "limit=6", *QUICK[1:]]
    options += ["diagnostics=simplifications", "diagnostics.images=4", "logger=csv"]
    place = f"checkpoint={trained.directory}/frobenius"
    report = evaluate(composed("evaluate", *options, place, f"output_dir={tmp_path}/r"))
    found = Simplifications.model_validate_json((tmp_path / "r" / "simplifications.json").read_text())
    assert (found.attacks, found.split) == (["pgd_l2"], "test")
    with (tmp_path / "r" / "simplifications.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "r" / "images.csv").open() as file:
        images = [row for row in csv.DictReader(file) if int(row["image"]) < 4]
    for model, evaluated in zip(found.models, report.models, strict=True):
        assert (model.name, model.images, model.training_images) == (evaluated.name, 4, 4)
        assert [epoch.epoch for epoch in model.epochs] == [1, 2]
        assert {fall.eps for fall in model.falls} == {0.5, 3.0}
        own = [row for row in rows if (row["name"], row["split"]) == (model.name, "evaluated")]
        swept = [row for row in images if row["name"] == model.name]
        fall = next(fall for fall in model.falls if fall.eps == 3)
        broken = [row for row in own if row["smallest_known_l2"] and float(row["smallest_known_l2"]) <= 3]
        assert fall.fell == len(broken) > 0
        # whatever the attack broke has fallen, whether FAB broke it or not
        assert {row["image"] for row in broken} >= {
            row["image"] for row in swept if row["label"] == row["predicted"] and row["robust_l2_3"] == "0"
        }
        assert colours(tmp_path / "r" / "simplifications.png") > 20
    assert found.models[0].condition_bound == "center"
    assert "six simplifications" in (tmp_path / "r" / "report.html").read_text()
    assert "what the condition ‖J‖ ≤ d/ε promised" in capsys.readouterr().out


def test_of_a_foreign_model_the_simplifications_are_measured_without_its_training(trained, tmp_path):
    weights = load_checkpoint(trained.directory / "vanilla" / "checkpoints" / "last.ckpt").state_dict
    torch.save(weights, tmp_path / "weights.pt")
    options = ["diagnostics=simplifications", "diagnostics.images=2", "logger=csv", "model=lenet", "data=mnist"]
    run(tmp_path, f"checkpoint={tmp_path}/weights.pt", "limit=2", *options)
    (model,) = Simplifications.model_validate_json((tmp_path / "results" / "simplifications.json").read_text()).models
    assert model.training_images is model.condition_eps is None
    assert model.epochs == []
    assert {fall.eps for fall in model.falls} == {0.5, 1.0, 1.5, 2.0}
