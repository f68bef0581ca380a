"""A set of runs in the same axes: table, plots, and what is left out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import leanvit
from leanvit.cli import app
from leanvit.errors import ConfigError
from leanvit.pareto import InEngine, measure
from leanvit.report.plots import frontier
from leanvit.report.tables import read_csv
from leanvit.runs import unfinished

from .contract import small_vit

DIGITS = {"in_chans": 1, "img_size": 16, "patch_size": 8}
QUICK = ("--num-bench-iter", "2", "--threads", "1", "-b", "4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, a lean one, and runs: finished, stopped half-way, and without a model."""
    root = tmp_path_factory.mktemp("runs")
    vit = small_vit(**DIGITS)
    leanvit.save(vit, root / "dense")
    lean = leanvit.slim(vit, leanvit.GLAD(at=2))
    leanvit.save(lean, root / "saved")
    for name, epochs in (("finished", 2), ("stopped", 1)):
        leanvit.save(lean, root / name / "best")
        (root / name / "args.yaml").write_text("epochs: 2\n")
        (root / name / "metrics.csv").write_text("epoch,train_loss\n" + "1,0.5\n" * epochs)
    (root / "empty").mkdir()
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="leanvit")


def test_why_a_run_is_not_finished(folders, tmp_path):
    assert unfinished(folders / "finished") == unfinished(folders / "saved") == ""
    assert unfinished(folders / "stopped") == "1 of 2 epochs are done"
    assert unfinished(folders / "empty") == "it holds no model"
    assert unfinished(folders / "nowhere") == "there is no such folder"
    shutil.copytree(folders / "finished", tmp_path / "damaged")
    (tmp_path / "damaged" / "args.yaml").write_text("- no settings")
    assert "args.yaml or metrics.csv cannot be read" in unfinished(tmp_path / "damaged")


def test_the_whole_command(folders, tmp_path):
    found = run(
        "pareto", folders / "dense", folders / "finished", "--method", "merging:r=1", "--data-dir", "digits",
        "--output", tmp_path / "out", *QUICK,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [row["model"] for row in rows] == ["dense", "merging:r=1", "finished"]
    assert rows[0]["speedup"] == 1 and rows[0]["top1_diff"] == 0 and all(row["engine"] == "torch" for row in rows)
    for name in ("pareto-throughput.png", "pareto-macs.png"):
        assert Image.open(tmp_path / "out" / name).width > 300


def test_incomplete_runs_are_named_and_the_exit_code_says_so(folders, tmp_path):
    settings = {
        "model": str(folders / "dense"),
        "runs": [str(folders / name) for name in ("stopped", "finished", "empty")],
        "data-dir": "digits",
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(settings))
    found = run("pareto", "-c", tmp_path / "runs.yaml", *QUICK)
    told = " ".join(found.stderr.split())
    assert found.exit_code == 1, found.output
    assert "stopped is left out: 1 of 2 epochs are done" in told and "empty is left out: it holds no model" in told
    assert "2 of 3 runs were left out" in told
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in written["rows"]] == ["dense", "finished"] and len(written["left_out"]) == 2


def test_nothing_to_compare_with(folders):
    found = run("pareto", folders / "dense", folders / "empty", "--data-dir", "digits")
    assert found.exit_code == 2 and "nothing to compare with: no complete run" in found.stderr


def test_runs_of_the_same_name(folders, tmp_path):
    shutil.copytree(folders / "saved", tmp_path / "saved")
    other, out = tmp_path / "saved", tmp_path / "out"
    given = ("pareto", folders / "dense", folders / "saved")
    found = run(*given, other, "--data-dir", "digits", "--output", out, *QUICK)
    assert found.exit_code == 0, found.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", str(folders / "saved"), str(other)]
    found = run(*given, folders / "saved", "--data-dir", "digits")
    assert found.exit_code == 2 and "is given more than once" in found.stderr


def test_other_sizes_and_engines_in_the_same_table(monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    vit = small_vit(**DIGITS)
    monkeypatch.setattr(leanvit.GLAD, "data_dependent", True)
    models = {
        "dense": vit,
        "smaller": small_vit(**{**DIGITS, "img_size": 8}),
        "merging": leanvit.slim(vit, leanvit.TokenMerging(r=1)),
        "adaptive": leanvit.slim(vit, leanvit.GLAD(at=2)),
    }
    options = {"batch_sizes": (2,), "threads": 1, "iterations": 1, "progress": False, "split": "val"}
    rows = measure(models, "digits", engines=("torch", "onnxruntime"), **options).rows
    assert [(row["engine"], row["model"]) for row in rows] == [
        *(("torch", name) for name in models),
        *(("onnxruntime", name) for name in models if name != "adaptive"),
    ]
    assert rows[1]["infer_img_size"] == 8 and rows[0]["top1"] == rows[4]["top1"]
    (row, *_) = measure({"dense": vit}, "digits", engines=("onnxruntime",), precisions=("int8",), **options).rows
    assert abs(row["top1"] - rows[0]["top1"]) < 5


def test_of_macs_less_is_better():
    rows = [{"infer_gmacs": gmacs, "top1": top1} for gmacs, top1 in ((1.0, 80), (0.5, 79), (0.7, 78), (0.4, 70))]
    assert frontier(rows, "infer_gmacs", "top1") == [rows[3], rows[1], rows[0]]


def test_an_engine_that_is_not_known():
    with pytest.raises(ConfigError, match="engine is 'tvm'"):
        measure({"dense": torch.nn.Identity()}, "digits", engines=("tvm",))


def test_images_go_where_the_model_is():
    seen = []

    class Engine:
        dtype = torch.float32

        def __call__(self, images):
            seen.append(images.device.type)
            return images

    ready = InEngine(small_vit(), "torch", "fp32", 1, torch.device("cpu"))
    ready.run, ready.device = Engine(), torch.device("meta")
    ready(torch.zeros(1, 3, 32, 32))
    assert seen == ["meta"]


def test_a_split_by_path_serves_what_decides_by_the_image_too(tmp_path):
    folder = tmp_path / "photos" / "b" / "one"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("L", (16, 16), 60 * number).save(folder / f"{number}.png")
    lean = leanvit.slim(small_vit(**DIGITS), leanvit.AdaViT())
    options = {"batch_sizes": (2,), "threads": 1, "iterations": 1, "progress": False}
    options |= {"split": "b", "class_map": {"one": 0}}
    rows = measure({"dense": small_vit(**DIGITS), "adaptive": lean}, str(tmp_path / "photos"), **options).rows
    assert {row["model"] for row in rows} == {"dense", "adaptive"}
