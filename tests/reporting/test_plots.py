"""The number of images stands in every figure that shows shares of them."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from jacobian_robust.reporting import figures as plots
from jacobian_robust.reporting.console import print_results
from jacobian_robust.reporting.gallery import Tile
from jacobian_robust.reporting.html import write_report
from jacobian_robust.robustness.examples import Examples
from jacobian_robust.robustness.schema import (
    AttackOutcome,
    Budget,
    Calibration,
    Certification,
    CertifiedBudget,
    ClassAccuracy,
    NoisePoint,
    Results,
    Threat,
    groups,
)
from jacobian_robust.robustness.statistics import wilson_interval

from ..robustness.test_schema import model


@pytest.fixture
def results():
    measured = {
        "calibration": Calibration(ece=0.1, nll=0.2, brier=0.1, bins=[(0.6, 0.5, 40), (0.9, 0.95, 60)]),
        "noise": [NoisePoint(sigma=0, accuracy=0.9), NoisePoint(sigma=0.3, accuracy=0.5)],
        "classes": [ClassAccuracy(label=0, images=100, clean_correct=90, robust_correct={"linf": [50]})],
    }
    seeds = [model("a/seed0", 0, 0.9, 0.5), model("a/seed1", 1, 0.8, 0.7)]
    return Results(
        split="validation",
        independent=False,
        seed=0,
        device="cpu",
        versions={},
        attacks={},
        models=[seed.model_copy(update=measured) for seed in seeds],
    )


def written(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_figures_of_shares_say_of_how_many_images(results):
    figures = plots.comparison(results, groups(results.models))
    options = [{"eta.max": 0.1}, {"eta.max": 0.2}]
    figures["trade_off"] = plots.trade_off(results, options, "eta.max")
    assert figures.keys() >= {"accuracy_linf", "seeds_linf", "calibration", "noise", "trade_off"}
    for name, figure in figures.items():
        if not name.startswith("classes"):  # there the number stands beside each class
            assert re.search("100 (clean )?validation images", written(figure)), name


def test_a_calibration_without_numbers_is_a_dash_in_figure_and_report(results, tmp_path):
    undefined = Calibration(ece=None, nll=None, brier=None, bins=[(0.6, 0.5, 40)])
    models = [results.models[0].model_copy(update={"calibration": undefined})]
    results = results.model_copy(update={"models": models})
    assert "ECE –" in written(plots.reliability_diagram(models, split="test"))
    write_report(tmp_path / "report.html", results, [], {}, {})
    assert "<td>–</td><td>–</td><td>–</td>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("norm", "label"), [("linf", "ε = 0.3"), ("l2", "ε = 0.3"), ("gaussian", "σ = 0.3")])
def test_broken_images_stand_beside_their_budget_as_its_norm_calls_it(norm, label):
    image, one = torch.zeros(1, 1, 4, 4), torch.ones(1)
    broken = Examples(image, image + 0.3, torch.tensor([1]), torch.tensor([2]), one, one)
    assert label in written(plots.adversarial_examples({0.3: broken}, norm=norm, title="a"))


def test_classes_are_called_by_their_names(results):
    model = results.models[0].model_copy(
        update={
            "classes": [
                ClassAccuracy(
                    label=0, name="a_folder_of_$5", images=100, clean_correct=90, robust_correct={"linf": [50]}
                )
            ]
        }
    )
    assert r"a_folder_of…  (100)" in written(plots.class_accuracy(model))
    image, one = torch.zeros(1, 1, 4, 4), torch.ones(1)
    broken = Examples(image, image + 0.3, torch.tensor([1]), torch.tensor([2]), one, one)
    names = ("coat", "bag", "US$")
    sheet = plots.adversarial_examples({0.3: broken}, norm="linf", title="a", class_names=names)
    sheet.draw_without_rendering()
    assert {"bag: 100%", r"US\$: 100%"} <= {text.get_text() for axes in sheet.axes for text in axes.texts}


def met(eps, *names):
    """A budget that attacks met."""
    outcomes = [AttackOutcome(attack=name, met=50, broken=0, discarded=0) for name in names]
    robust = {"attacked": 90, "correct": 50, "images": 100, "share_of_attacked": 0.5, "robust_accuracy": 0.5}
    return Budget(eps=eps, attacks=outcomes, **robust)


def certification(name, norm, shares, *, smoothed=False):
    budgets = [CertifiedBudget(eps=eps, certified=int(100 * s), certified_accuracy=s) for eps, s in shares.items()]
    counts = {"correct": 88, "abstained": 2 * smoothed, "samples": 500 * smoothed, "pairs": 40}
    radius = 0.4 if norm == "l2" else None
    return Certification(
        certificate=name, norm=norm, smoothed=smoothed, budgets=budgets, median_radius=radius, broken=[], **counts
    )


@pytest.fixture
def certified(results):
    """Of two models, one with an interval certificate in ℓ∞ and a smoothing certificate in ℓ2."""
    first, second = results.models
    attacked = {"linf": {0.1: 0.8, 0.2: 0.7, 0.3: 0.3}, "l2": {0.5: 0.6, 1.0: 0.4}}
    covered = {"linf": {0.1: 0.75, 0.2: 0.5, 0.3: 0.0}, "l2": {}}
    threats = {}
    for name, known in (("first", covered), ("second", {"linf": {}, "l2": {}})):
        threats[name] = [
            Threat(
                norm=norm,
                budgets=[
                    Budget(
                        **{"eps": eps, "attacked": 90, "correct": int(100 * share), "images": 100},
                        **{"share_of_attacked": share / 0.9, "robust_accuracy": share, "attacks": []},
                        certified_accuracy=known[norm].get(eps),
                        certified=None if eps not in known[norm] else int(100 * known[norm][eps]),
                    )
                    for eps, share in budgets.items()
                ],
            )
            for norm, budgets in attacked.items()
        ]
    by_class = [first.classes[0].model_copy(update={"robust_correct": {"linf": [80, 70, 30], "l2": [60, 40]}})]
    said = [
        certification("interval", "linf", covered["linf"]),
        certification("smoothing", "l2", {0.5: 0.85, 1.0: 0.2}, smoothed=True),
    ]
    models = [
        first.model_copy(update={"threats": threats["first"], "certificates": said, "classes": by_class}),
        second.model_copy(update={"threats": threats["second"], "classes": by_class}),
    ]
    parameters = {"interval": {"norm": "linf"}, "smoothing": {"norm": "l2", "sigma": 0.25, "confidence": 0.999}}
    return results.model_copy(update={"models": models, "certificates": parameters})


def test_the_gap_between_certified_and_attacked_is_shaded(certified):
    figure = plots.certified_curves(certified, norm="linf")
    (axes,) = figure.axes
    attacked, covered = axes.lines
    assert list(attacked.get_ydata()) == [0.9, 0.8, 0.7, 0.3]
    assert list(covered.get_ydata()) == [0.9, 0.75, 0.5, 0.0]
    (shaded,) = axes.collections
    edge = {tuple(round(float(v), 6) for v in point) for point in shaded.get_paths()[0].vertices}
    assert {(0.2, 0.5), (0.2, 0.7), (0.3, 0.0), (0.3, 0.3)} <= edge
    assert "100 validation images" in written(figure)
    smoothed = plots.certified_curves(certified, norm="l2")
    assert "of the smoothed classifier" in written(smoothed)
    assert not smoothed.axes[0].collections, "it bounds nothing of the network"


def test_the_overview_has_a_bar_for_each_share_with_its_interval(certified):
    figure = plots.overview(certified, norm="linf")
    clean, *panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["ℓ∞ ε = 0.1", "ℓ∞ ε = 0.2", "ℓ∞ ε = 0.3"]
    attacked, covered = (bars.patches for bars in panels[1].containers if hasattr(bars, "patches"))
    assert [bar.get_width() for bar in attacked] == [0.7, 0.7]
    assert [bar.get_width() for bar in covered] == [0.5, 0]
    assert {text.get_text() for text in panels[1].texts} == {"70.0% (50.0%)", "70.0%"}
    assert wilson_interval(0.7, 100) == pytest.approx((0.6042, 0.7811), abs=1e-4)  # as published tables have it
    assert len(clean.texts) == 2


def test_a_network_of_which_nothing_is_certified_has_no_certified_line(certified):
    none = {0.1: 0.0, 0.2: 0.0, 0.3: 0.0}
    budgets = [b.model_copy(update={"certified_accuracy": 0.0}) for b in certified.models[0].threats[0].budgets]
    threats = [certified.models[0].threats[0].model_copy(update={"budgets": budgets})]
    said = [certification("interval", "linf", none)]
    first = certified.models[0].model_copy(update={"threats": threats, "certificates": said})
    figure = plots.certified_curves(certified.model_copy(update={"models": [first]}), norm="linf")
    (axes,) = figure.axes
    assert len(axes.lines) == 1
    assert "none certified" in written(figure)
    assert not axes.collections


def test_certified_stands_beside_robust_under_attack(certified, tmp_path, capsys):
    write_report(tmp_path / "report.html", certified, [], {}, {})
    report = (tmp_path / "report.html").read_text()
    print_results(certified, [])
    printed = capsys.readouterr().out
    in_linf, in_l2 = printed.split("ℓ2, worst case")
    assert re.search(r"80\.0% │ +75\.0% │ +70\.0% │ +50\.0% │ +30\.0% │ +0\.0% │", in_linf)
    assert re.search(r"80\.0% │ +– │ +70\.0% │ +– │", in_linf), "the model without a certificate"
    assert "certified beside" not in in_linf, "one certificate fits into the table of the attacks"
    assert "100 images tell a share of all images to ± 8.8 points at most" in in_linf, "30% is 21.9 to 39.6%"
    assert "certified beside" in in_l2
    assert re.search(r"0\.5 │ +60\.0% │ +85\.0% │", printed)
    assert "<td>0.2</td><td>70.0%</td><td>50.0%</td>" in report
    assert "<td>0.5</td><td>60.0%</td><td>85.0%</td>" in report
    for text in (report, " ".join(printed.split())):
        assert "not the network that is attacked" in text
        assert "σ = 0.25, confidence 0.999" in text


def starred(text):
    return re.findall(r"[εσ] = ([\d.]+)\*", text)


def test_a_budget_that_not_every_attack_met_is_marked_wherever_a_worst_case_stands(results, tmp_path, capsys):
    every = {"linf": ("fgsm", "pgd_linf", "autoattack"), "l2": ("pgd_l2",)}
    attacks = {name: {"norm": norm} for norm, names in every.items() for name in names}
    linf = [met(0.1, *every["linf"]), met(0.2, "pgd_linf", "autoattack"), met(0.4, "pgd_linf"), met(0.5, "pgd_linf")]
    threats = [Threat(norm="linf", budgets=linf), Threat(norm="l2", budgets=[met(1.0, "pgd_l2")])]
    by_class = {"linf": 4 * [50], "l2": [50]}
    update = {
        "threats": threats,
        "classes": [results.models[0].classes[0].model_copy(update={"robust_correct": by_class})],
    }
    models = [model.model_copy(update=update) for model in results.models]
    results = results.model_copy(update={"attacks": attacks, "models": models})
    note = "ε = 0.2 without fgsm; ε = 0.4, 0.5 without fgsm, autoattack"
    alike = groups(models)
    write_report(tmp_path / "report.html", results, alike, {}, {})
    text = (tmp_path / "report.html").read_text()
    assert starred(text) == 2 * ["0.2", "0.4", "0.5"], "in the table, and in that of the mean over the seeds"
    assert text.count(f"* {note}<") == 1
    print_results(results, alike)
    printed = capsys.readouterr().out
    assert starred(printed) == ["0.2", "0.4", "0.5"]
    assert f"* {note}" in printed
    figures = plots.comparison(results, alike)
    for name in ("accuracy", "seeds"):
        assert note in written(figures[f"{name}_linf"])
        assert "without" not in written(figures[f"{name}_l2"])


@pytest.mark.parametrize("independent", [False, True])
def test_it_is_told_that_larger_budgets_break_images_in_smaller_balls(results, tmp_path, independent):
    """The attacks' counts leave more images than the tables then."""
    write_report(tmp_path / "report.html", results.model_copy(update={"independent": independent}), [], {}, {})
    part = (tmp_path / "report.html").read_text().split("<h2>Attack by attack</h2>")[1].split("<table>")[0]
    assert ("an example found at a larger budget" in part) is not independent
    described = Results.model_json_schema()["$defs"]["Budget"]["properties"]["correct"]["description"]
    assert "larger one by an example that lies in this ball" in described


def test_the_prediction_scatter_counts_its_points():
    predicted = torch.tensor([1.0, 2.0, 3.0, torch.inf])
    found = torch.tensor([0.5, 3.0, torch.inf, 1.0])  # one was not broken, one has no gradient
    assert "a, 2 images" in written(plots.predicted_against_found({"a": (predicted, found)}))


def test_many_models_neither_shrink_the_scatters_nor_cover_the_lines(results):
    points = {str(i): (torch.ones(3), torch.ones(3)) for i in range(4)}
    figure = plots.predicted_against_found(points)
    assert figure.get_size_inches().tolist() == [3 * 5.6, 2 * 5]
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [f"{i}, 3 images" for i in range(4)]
    for models, inside in ((6, True), (7, False)):
        several = [results.models[0].model_copy(update={"name": str(i)}) for i in range(models)]
        figure = plots.accuracy_curves(several, norm="linf", split="test")
        assert (figure.axes[0].get_legend() is not None) == inside
        (legend,) = figure.legends or [figure.axes[0].get_legend()]
        assert len(legend.get_texts()) == models


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("penalised", [True, False])
def test_every_panel_of_a_training_says_what_it_measures(twin, penalised):
    names = ["loss", "cross_entropy", "accuracy", "jacobian_norm"] + ["penalty"] * penalised
    rows = [{"epoch": 1, **{f"{stage}_{name}": 0.5 for stage in ("train", "validation") for name in names}}]
    figure = plots.training_curves(rows, twin=rows if twin else None, penalised=penalised, validation_name="test")
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.lines for axes in figure.axes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["linear_margin_noise", "vanilla"], ["linear margin + noise", "undefended"]),
        (["linear_margin+noise", "fgsm"], ["linear margin + noise", "FGSM training"]),
        (["note_vanilla_seed1", "note_vanilla_seed2"], ["undefended, seed 1", "undefended, seed 2"]),
        (["sweep/frobenius", "mine/my_net"], ["Frobenius penalty", "mine/my_net"]),
        (["a/vanilla", "b/vanilla"], ["a + undefended", "b + undefended"]),
        (["note_vanilla", "vanilla"], ["note_vanilla", "vanilla"]),  # they would be called the same
        (["eta.max=0.1", "<b>vanilla</b>"], ["eta.max=0.1", "<b>vanilla</b>"]),
    ],
)
def test_runs_are_called_by_words_where_these_tell_them_apart(names, said):
    assert plots.in_words(names) == said


def test_the_names_of_points_cover_neither_each_other_nor_a_point():
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = [(x / 10, 0.5 + 0.01 * (x % 3), f"a long name {x}", plots.PALETTE[0]) for x in range(2, 8)]
    axes.plot(*zip(*(point[:2] for point in points), strict=True), "o")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    plots.name_points(figure, axes, points)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(points)
    places = axes.transData.transform([point[:2] for point in points])
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(x, y) for x, y in places)


def test_two_lines_are_named_beside_them(results):
    figure = plots.accuracy_curves(results.models, norm="linf", split="test")
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        line.get_label(): line.get_color() for line in axes.lines
    }


def test_a_picture_for_a_document_is_small_and_not_blank(tmp_path, results):
    figure = plots.accuracy_curves(results.models, norm="linf", split="test")
    plots.write_picture(figure, tmp_path / "curve")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.mode == "P"
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_changes_stand_beside_a_scale_of_their_colours():
    image, one = torch.zeros(1, 1, 4, 4), torch.ones(1)
    broken = Examples(image, image + 0.25, torch.tensor([1]), torch.tensor([2]), one, one)
    sheet = written(plots.adversarial_examples({0.3: broken}, norm="linf", title="a"))
    assert "+0.25" in sheet
    assert "-0.25" in sheet


def tile(label, outcome, number):
    return Tile("<i>net</i>", label, outcome, ["AAAA", "BBBB"], ["1: 90%", "<b>: 80%"], number)


def test_the_gallery_is_searched_by_class_and_outcome_and_escapes_names(results, tmp_path):
    tiles = [tile("<script>", "robust in ℓ∞", 3), tile("cat", "robust in ℓ∞", 4), tile("cat", "broken", 5)]
    write_report(tmp_path / "report.html", results, [], {}, {}, tiles=tiles)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>: 80%" not in text
    assert "<i>net" not in text
    assert 'data-label="1" data-outcome="1"' in text
    for rule in ('.by-label option[value="1"]:checked', '.by-outcome option[value="1"]:checked'):
        assert rule in text
    assert '<option value="1">cat</option>' in text
    assert "by-model" not in text.split("<body>")[1], "there is one"


def test_a_report_begins_with_a_sentence_a_table_and_the_overview(certified, tmp_path):
    figures = plots.save(plots.comparison(certified, []), tmp_path)
    write_report(tmp_path / "report.html", certified, [], figures, {})
    text = (tmp_path / "report.html").read_text()
    head = text.split("<h2>")[0]
    # The largest budget at which one is right on half of the images: 80, 70 and 30% are.
    assert "Under every attack within ℓ∞ ε = 0.2, a/seed0 is right on 70.0% of 100 validation images" in head
    assert "a/seed0 is certified there on 50.0%" in head
    assert head.count("<table>") == head.count("<figure") == 1
    assert 'id="overview_linf"' in head
    assert text.count('id="certified_linf"') == 1
