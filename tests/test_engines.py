"""Engines: each gives the model's outputs, each is timed against the dense model in the same engine."""

from __future__ import annotations

import shutil

import pytest
import torch
from typer.testing import CliRunner

import leanvit
from leanvit.cli import app
from leanvit.engines import ENGINES, PRECISIONS, check_engines
from leanvit.errors import ConfigError
from leanvit.report.tables import read_csv

from .contract import photos, small_vit

CPU = torch.device("cpu")
compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler"
)


def ready(name: str, model: torch.nn.Module, precision: str = "fp32"):
    """The model in an engine; skips where that is not installed."""
    for package in ENGINES[name].packages:
        pytest.importorskip(package, reason=f"the extra {ENGINES[name].extra} is not installed")
    return ENGINES[name](model, precision, 1, CPU)


@pytest.fixture(scope="module")
def fast():
    return leanvit.deploy(leanvit.slim(small_vit(), leanvit.DGSSA(layers=(0, 1)), leanvit.GLAD(at=2)))


@pytest.mark.parametrize("name", ["torch", pytest.param("compile", marks=compiler), "onnxruntime", "openvino"])
@torch.no_grad()
def test_every_engine_gives_the_models_outputs(name, fast):
    run = ready(name, fast)
    images = photos(fast)
    for count in (6, 1):
        assert (run(images[:count].to(run.dtype)) - fast(images[:count])).abs().max() < 1e-3


@pytest.mark.parametrize(("name", "precision"), [("torch", "bf16"), ("onnxruntime", "int8"), ("openvino", "bf16")])
@torch.no_grad()
def test_lower_precisions_stay_close(name, precision, fast):
    run = ready(name, fast, precision)
    images = photos(fast)
    expected = fast(images)
    assert 0 < (run(images.to(run.dtype)) - expected).abs().max() < 0.1 * expected.abs().max()
    assert next(fast.parameters()).dtype is torch.float32


def test_dense_in_every_engine_is_the_reference(fast):
    for package in ENGINES["onnxruntime"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    models = {"dense": small_vit(), "lean": fast}
    rows = leanvit.bench(
        models, engines=("torch", "onnxruntime"), precisions=("fp32",), batch_sizes=(1, 2), threads=1, iterations=2,
        warmup=1, progress=False,
    )  # fmt: skip
    assert [(row["engine"], row["infer_batch_size"], row["model"]) for row in rows] == [
        (engine, size, name) for engine in ("torch", "onnxruntime") for size in (1, 2) for name in models
    ]
    for dense, lean in zip(rows[::2], rows[1::2], strict=True):
        assert dense["speedup"] == 1
        assert lean["speedup"] == pytest.approx(lean["infer_samples_per_sec"] / dense["infer_samples_per_sec"])
        assert (dense["peak_memory_mb"] is None) == (dense["engine"] == "onnxruntime")


@pytest.mark.parametrize(
    ("engines", "precisions", "device", "message"),
    [
        (("tensorrt",), ("fp32",), "cpu", "engine is 'tensorrt'; known are torch, compile, onnxruntime, openvino"),
        (("onnxruntime",), ("fp32", "bf16"), "cpu", "precision is 'bf16'; onnxruntime computes in fp32, int8"),
        (("torch", "openvino"), ("fp16",), "cpu", "precision is 'fp16'; openvino computes in fp32, bf16"),
        (("torch",), ("int8",), "cpu", "precision is 'int8'; torch computes in fp32, bf16, fp16"),
        (("onnxruntime",), ("fp32",), "cuda:1", "device is 'cuda:1'; onnxruntime runs on cpu here"),
    ],
)
def test_what_an_engine_cannot_do(engines, precisions, device, message):
    with pytest.raises(ConfigError, match=message):
        check_engines(engines, precisions, torch.device(device))


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_an_engine_that_is_not_installed(name, extra, monkeypatch):
    monkeypatch.setattr("leanvit.engines.find_spec", lambda package: None if package == name else object())
    with pytest.raises(ConfigError, match=rf"{name} is missing: pip install 'leanvit\[{extra}\]'"):
        leanvit.bench({"dense": small_vit()}, engines=(name,), precisions=("fp32",), progress=False)


def test_a_model_that_an_engine_cannot_take(monkeypatch):
    monkeypatch.setattr(leanvit.GLAD, "data_dependent", True)
    lean = leanvit.slim(small_vit(), leanvit.GLAD(at=2))
    for package in ENGINES["onnxruntime"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    with pytest.raises(leanvit.ExportError, match="glad is not exported: it computes something else for every image"):
        leanvit.bench((small_vit(), lean), engines=("onnxruntime",), precisions=("fp32",), progress=False)


def test_engines_say_what_they_are():
    assert set(ENGINES) == {"torch", "compile", "onnxruntime", "openvino"}
    assert set(PRECISIONS) == {"fp32", "bf16", "fp16"}


def test_command(tmp_path):
    for package in ENGINES["onnxruntime"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    leanvit.save(leanvit.slim(small_vit(), leanvit.GLAD(at=2)), tmp_path / "saved")
    arguments = ["bench", str(tmp_path / "saved"), "-b", "2", "--num-bench-iter", "2", "--num-warm-iter", "1"]
    run = CliRunner().invoke(
        app,
        [*arguments, "--engine", "torch,onnxruntime", "--results-file", str(tmp_path / "rows.csv"), "--threads", "1"],
    )
    assert run.exit_code == 0, run.output
    assert [row["engine"] for row in read_csv(tmp_path / "rows.csv")] == ["torch"] * 2 + ["onnxruntime"] * 2
    refused = CliRunner().invoke(app, [*arguments, "--engine", "onnxruntime", "--precision", "bf16"])
    assert refused.exit_code == 2 and "onnxruntime computes in fp32, int8" in refused.stderr
