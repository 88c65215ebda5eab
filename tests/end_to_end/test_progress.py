from .conftest import SHORT


def test_the_bar_shows_loss_accuracy_and_time_left_and_a_table_closes_the_run(door):
    overrides = [o for o in SHORT if "progress" not in o]
    result = door(
        "train", *overrides, "regularizer=none", "logger=csv", "trainer.max_epochs=1", "trainer.limit_train_batches=12"
    )
    assert result.status == 0
    bars = [line for line in (result.stdout + result.stderr).replace("\r", "\n").splitlines() if "Epoch 0" in line]
    assert any("loss=" in bar and "accuracy=" in bar and "all_done_in=" in bar for bar in bars)
    for word in ("cross entropy", "training", "validation", "last.ckpt", "metrics.csv", "curves.png", "summary.json"):
        assert word in result.stdout


def test_help_names_groups_fields_and_examples(door):
    for name in ("train", "evaluate"):
        text = door(name, "--help").stdout
        assert "attack: autoattack, autoattack_l2, fab_l2, fgsm, gaussian_noise, mifgsm, pgd_l2" in text
        assert f"python {name}.py" in text
