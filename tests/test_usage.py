"""What each image costs and uses: one by one, by block, by class, against random policies; budgets as a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import leanvit
from leanvit.cli import app
from leanvit.count import constant_macs, image_macs
from leanvit.data import open_data
from leanvit.per_image import correlation, per_image
from leanvit.report.tables import read_csv
from leanvit.usage import at_random, measure_usage

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blurred noise images of each of three classes, in train/ and val/."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 255, (5, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture(scope="module")
def fast(dense: torch.nn.Module, photos: Path) -> torch.nn.Module:
    """A deployed model whose images differ in cost."""
    lean = leanvit.slim(dense, leanvit.AdaViT())
    with torch.no_grad():
        for block in lean.blocks[1:]:
            torch.nn.init.normal_(block.decide.patch.weight)
            torch.nn.init.normal_(block.decide.image.weight)
    leanvit.set_budget(lean, 0.7, str(photos / "val"))
    return leanvit.deploy(lean)


def val(photos: Path, model: torch.nn.Module):
    return open_data(str(photos), model, split="val")


def test_evaluation_tells_the_distribution_of_cost(fast, dense, photos):
    result = leanvit.evaluate(fast, str(photos), progress=False)
    row = result.row()
    assert row["gmacs_p5"] < row["gmacs_mean"] < row["gmacs_p95"]
    assert row["gmacs_mean"] * 1e9 / leanvit.count(dense).macs == pytest.approx(0.7, rel=0.05)
    assert leanvit.evaluate(dense, str(photos), progress=False).macs is None


def test_per_image_costs_are_those_of_the_evaluation(fast, photos):
    table = per_image(fast, val(photos, fast), progress=False)
    result = leanvit.evaluate(fast, str(photos), progress=False)
    assert [row["gmacs"] * 1e9 for row in table.rows] == pytest.approx(result.macs.tolist())
    assert [row["prediction"] for row in table.rows] == result.predictions.tolist()
    assert all(row["latency"] > 0 and row["image"].endswith(".png") for row in table.rows)


def test_correlation():
    rows = [{"gmacs": cost, "latency": 2 * cost + 1} for cost in (1.0, 2.0, 4.0)]
    assert correlation(rows) == pytest.approx(1)
    assert correlation([{**row, "gmacs": 1.0} for row in rows]) is None


def test_usage_by_block_and_class(fast, photos):
    usage = measure_usage(fast, val(photos, fast), progress=False)
    assert usage.layers == [1, 2, 3] and usage.patches.shape == (12, 3, 16)
    assert usage.heads.shape == (12, 3, 3) and usage.sublayers.shape == (12, 3, 2)
    classes = usage.classes(list(CLASSES))
    assert sorted(row["class"] for row in classes) == sorted(CLASSES)
    assert classes == sorted(classes, key=lambda row: row["gmacs"])
    with pytest.raises(leanvit.UnsupportedModelError, match="decides nothing per image"):
        measure_usage(leanvit.slim(timm.create_model("vit_tiny_patch16_224", depth=2), leanvit.GLAD(at=1)), None)


@torch.no_grad()
def test_random_policies_have_the_usage_asked_for(fast):
    images = torch.randn(64, 3, 32, 32)
    rates = dict.fromkeys((1, 2, 3), (0.6, 0.8, 0.5))
    with leanvit.record("patch_usage", "head_usage", "sublayer_usage") as found:
        at_random(fast, rates)(images)
    for kind, rate in (("patch_usage", 0.6), ("head_usage", 0.8), ("sublayer_usage", 0.5)):
        assert torch.stack([one.value.mean() for one in found[kind]]).mean() == pytest.approx(rate, abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"partial": True}, {"patches": 1}, {"heads": 1, "first": 2}])
@torch.no_grad()
def test_targets_of_a_budget_cost_what_was_asked_for(dense, settings):
    method = leanvit.AdaViT(**settings).for_budget(dense, 0.7)
    fast = leanvit.deploy(leanvit.slim(dense, method))
    constant = constant_macs(fast)
    with leanvit.record("macs") as found:
        at_random(fast, dict.fromkeys(range(4), method.targets))(torch.randn(400, 3, 32, 32))
    cost = float(image_macs(found, constant).mean()) / leanvit.count(dense).macs
    assert cost == pytest.approx(0.7, rel=0.06)


def test_a_budget_that_no_usage_reaches(dense):
    with pytest.raises(leanvit.ConfigError, match=r"no usage gives a budget of 0\.1: from block 1 on, .* reaches 0\.3"):
        leanvit.AdaViT().for_budget(dense, 0.1)
    with pytest.raises(leanvit.ConfigError, match="glad has no budget"):
        leanvit.GLAD().for_budget(dense, 0.5)


# ---- commands


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = sys.modules["leanvit.bench"]
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST", 1)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="leanvit")


def test_usage_command_writes_pictures_and_json(fast, photos, tmp_path):
    leanvit.save(fast, tmp_path / "model")
    result = run("usage", tmp_path / "model", "--data-dir", photos, "--val-split", "val", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "usage.json", "blocks.png", "classes.png", "images.png", "random.png"
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "usage.json").read_text())
    assert [row["policies"] for row in report["policies"]] == ["learned", "random", "random, by block"]
    assert report["cheapest"][0]["gmacs"] <= report["dearest"][0]["gmacs"] and report["images"] == 12


def test_eval_per_image(fast, photos, tmp_path):
    leanvit.save(fast, tmp_path / "model")
    result = run("eval", tmp_path / "model", "--data-dir", photos, "--per-image", tmp_path / "images.csv")
    assert result.exit_code == 0 and "correlation" in result.output
    assert list(read_csv(tmp_path / "images.csv")[0]) == ["image", "label", "prediction", "gmacs", "latency"]


def test_slim_with_budgets(dense, photos, tmp_path):
    leanvit.save(dense, tmp_path / "dense")
    options = ("--data-dir", photos, "--epochs", "1", "-b", "4", "--device", "cpu", "--output", tmp_path / "run")
    result = run("slim", tmp_path / "dense", "--method", "adavit:ramp=0", "--budget", "0.6,0.8", *options)
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "run" / "results.csv")
    assert {row["budget"] for row in rows if row["model"] != "dense"} == {0.6, 0.8}
    assert (tmp_path / "run" / "budgets.png").exists()
    dense_gmacs = leanvit.count(dense).macs / 1e9
    for row in rows:
        if row["model"] == "dense":
            continue
        assert row["gmacs_mean"] == pytest.approx(row["budget"] * dense_gmacs, rel=0.15)  # of other images
        folder = tmp_path / "run" / f"budget-{row['budget']:g}"
        trained, fast = leanvit.load(folder / "best"), leanvit.load(folder / "deployed")
        assert fast.lean.deployed and not trained.lean.deployed
        thresholds = [float(block.decide.threshold) for block in (*trained.blocks[1:], *fast.blocks[1:])]
        assert thresholds[0] != 0 and len(set(thresholds)) == 1
    again = run("slim", tmp_path / "dense", "--method", "glad:at=2", *options)
    assert again.exit_code == 2 and "is not empty" in again.output


@torch.no_grad()
def test_targets_of_a_budget_beside_another_method(dense):
    pruning = leanvit.TokenPruning(at=0, keep=0.5)
    beside = leanvit.slim(dense, pruning)
    method = leanvit.AdaViT().for_budget(dense, 0.4, beside)
    fast = leanvit.deploy(leanvit.slim(dense, pruning, method))
    constant = constant_macs(fast)
    with leanvit.record("macs") as found:
        at_random(fast, dict.fromkeys(range(4), method.targets))(torch.randn(400, 3, 32, 32))
    cost = float(image_macs(found, constant).mean()) / leanvit.count(dense).macs
    assert cost == pytest.approx(0.4, rel=0.06)


def test_usage_where_tokens_were_removed_before(dense, photos, tmp_path):
    lean = leanvit.slim(dense, leanvit.TokenPruning(at=0, keep=0.7), leanvit.AdaViT())
    leanvit.save(lean, tmp_path / "model")
    result = run("usage", tmp_path / "model", "--data-dir", photos, "--val-split", "val", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "images.png").exists()


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("adavit", "half", "is not a list of shares"),
        ("adavit", "0.5,0.5", "names a share twice"),
        ("adavit", "0.01", "no usage gives a budget of 0.01"),
        ("glad:at=2", "0.5", "glad has no budget to aim at, adavit has"),
    ],
)
def test_bad_budgets(dense, photos, tmp_path, method, budget, message):
    leanvit.save(dense, tmp_path / "dense")
    result = run("slim", tmp_path / "dense", "--method", method, "--budget", budget, "--data-dir", photos)
    assert result.exit_code == 2 and message in result.output
