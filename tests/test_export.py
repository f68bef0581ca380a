"""Files for other engines: the same outputs, metadata, and every way to refuse."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import leanvit
from leanvit import export as export_function
from leanvit.cli import app
from leanvit.engines import OnnxFile, has_graph
from leanvit.export import FORMATS, metadata, sample_photos
from leanvit.methods import parse

from .contract import CASES, METHODS, Case, photos, small_vit

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

GRAPHLESS = {text for text in METHODS if not all(map(has_graph, parse(text)))}
EXPORTED = [Case(text) for text in METHODS if text not in GRAPHLESS]
EXPORTED += [case for case in CASES if case.method == "dgssa:layers=0,1+glad:at=2,3" and case.model != "class token"]
REFUSED = [Case(text) for text in METHODS if text in GRAPHLESS]
DENSE = [Case("", model) for model in ("class token", "layer scale, q/k norm")]


def lean(case: Case):
    """The case's dense model and its deployed form, every parameter of the methods moved."""
    vit = case.vit()
    model = leanvit.slim(vit, *(case.methods() if case.method else ()), images=photos(vit))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.new_parameter_names():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return vit, leanvit.deploy(model, force=True)


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(leanvit.ConfigError, match=r"cannot write .*No space left on device"):
        leanvit.export(small_vit(), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", EXPORTED + DENSE, ids=str)
@torch.no_grad()
def test_onnx_gives_torch_s_outputs(case, tmp_path):
    vit, fast = lean(case)
    images = photos(vit)
    found = leanvit.export(fast, tmp_path / "x.onnx", images=images)
    assert found.difference <= 1e-3 and found.images == len(images) and found.format == "onnx"
    run = OnnxFile(found.path)
    for count in (1, 3):
        assert (run(images[:count]) - fast(images[:count])).abs().max() <= 1e-3
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_methods_without_a_graph_are_refused_by_name(case, tmp_path):
    name = next(method.name for method in case.methods() if not has_graph(method))
    with pytest.raises(leanvit.ExportError, match=rf"{name} is not exported: .*; run it in torch.*a model of .*glad"):
        leanvit.export(leanvit.slim(case.vit(), *case.methods()), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_any_data_dependent_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(leanvit.GLAD, "data_dependent", True)
    with pytest.raises(leanvit.ExportError, match=r"glad is not exported: it computes something else for every.*dgssa"):
        leanvit.export(leanvit.slim(small_vit(), leanvit.GLAD(at=2)), tmp_path / "x.pt2")


def test_metadata_holds_preprocessing_and_classes(tmp_path):
    _, fast = lean(Case("glad:at=2"))
    names = [f"class {index}" for index in range(10)]
    leanvit.export(fast, tmp_path / "x.onnx", images=photos(fast), class_names=names)
    kept = {entry.key: entry.value for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert kept["method"] == "glad:at=2" and json.loads(kept["class_names"]) == names
    assert json.loads(kept["input_size"]) == [3, 32, 32] and json.loads(kept["mean"]) == [0.5, 0.5, 0.5]
    assert kept["interpolation"] == "bicubic" and kept["architecture"] == "vit_tiny_patch16_224"
    assert kept["producer"] == f"leanvit {leanvit.__version__}"


def test_names_of_a_head_that_is_gone_are_not_written(tmp_path):
    named = leanvit.load(leanvit.save(small_vit(), tmp_path / "x", class_names=[f"c{index}" for index in range(10)]))
    lean = leanvit.slim(named, leanvit.GLAD(at=(2,)))
    assert json.loads(metadata(lean)["class_names"])[9] == "c9"
    lean.reset_classifier(3)
    assert json.loads(metadata(lean)["class_names"]) == []


def test_a_program_runs_without_leanvit_s_classes(tmp_path):
    vit, fast = lean(Case("dgssa:layers=0,1+glad:at=2,3"))
    found = leanvit.export(fast, tmp_path / "x.pt2", images=photos(vit))
    extra = {"leanvit.json": ""}
    program = torch.export.load(found.path, extra_files=extra)
    images = photos(vit, 5)
    assert (program.module()(images) - fast(images)).abs().max() < 1e-4
    assert json.loads(extra["leanvit.json"])["method"] == "dgssa:layers=0,1+glad:at=2,3"


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_a_compiled_package(tmp_path):
    vit = small_vit(depth=2)
    fast = leanvit.deploy(leanvit.slim(vit, leanvit.GLAD(at=1)))
    found = leanvit.export(fast, tmp_path / "x.pt2", format="aotinductor", images=photos(vit))
    package = torch._inductor.aoti_load_package(str(found.path))
    images = photos(vit, 5)
    assert (package(images) - fast(images)).abs().max() < 1e-4
    assert package.get_metadata()["method"] == "glad:at=1"


def test_the_dense_model_and_one_batch_size(tmp_path):
    vit = small_vit()
    leanvit.export(vit, tmp_path / "x.onnx", dynamic_batch=False, batch_size=3, images=photos(vit))
    shape = onnx.load(tmp_path / "x.onnx").graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [3, 3, 32, 32]


@torch.no_grad()
def test_dynamic_size(tmp_path):
    vit = small_vit(dynamic_img_size=True)
    found = leanvit.export(vit, tmp_path / "x.onnx", dynamic_size=True, images=photos(vit))
    images = torch.randn(2, 3, 48, 24)
    assert (OnnxFile(found.path)(images) - vit(images)).abs().max() < 1e-3


def test_images_that_everybody_has():
    assert sample_photos(small_vit(), 8).shape == (8, 3, 32, 32)
    assert sample_photos(small_vit(in_chans=1), 4).shape == (4, 1, 32, 32)
    several = sample_photos(small_vit(), 8)
    assert all((several[0] - other).abs().max() > 0.1 for other in several[1:])


def test_a_mismatch_leaves_no_file(tmp_path, monkeypatch):
    kind = FORMATS["program"]

    def load(path):
        program = kind.load(path)
        return lambda images: program(images) + 2e-3

    monkeypatch.setitem(FORMATS, "program", kind.__class__(**{**vars(kind), "load": load}))
    vit = small_vit()
    (tmp_path / "x.pt2").write_text("the one before")
    with pytest.raises(
        leanvit.ExportError, match=r"x\.pt2: its outputs differ from torch's by 2\.0e-03, more than 0\.001"
    ):
        leanvit.export(vit, tmp_path / "x.pt2", images=photos(vit), overwrite=True)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["the one before"]


def test_a_model_that_is_not_deployed_is_deployed_and_said_so(tmp_path):
    vit = small_vit()
    model = leanvit.slim(vit, leanvit.GLAD(at=2))
    with pytest.warns(UserWarning, match="not deployed; its deployed form is exported"):
        leanvit.export(model, tmp_path / "x.pt2", images=photos(vit))
    assert not model.lean.deployed


BAD = {
    r"x\.tflite: the ending says the format; \.onnx and \.pt2": ("x.tflite", {}),
    r"format is 'tf'; known are onnx, program, aotinductor": ("x.onnx", {"format": "tf"}),
    r"x\.onnx does not end in \.pt2": ("x.onnx", {"format": "program"}),
    r"opset=9 cannot be written; 18 to \d+ can": ("x.onnx", {"opset": 9}),
    r"opset=999 cannot be written": ("x.onnx", {"opset": 999}),
    r"opset=20 is for ONNX files": ("x.pt2", {"opset": 20}),
    r"batch size is 0": ("x.onnx", {"batch_size": 0, "dynamic_batch": False}),
    r"dynamic size: the model takes one image size": ("x.onnx", {"dynamic_size": True}),
    r"3 class names for a model of 10 classes": ("x.pt2", {"class_names": ["a", "b", "c"]}),
    r"folder\.onnx is a folder; give the name of a file": ("folder.onnx", {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, tmp_path):
    name, options = BAD[message]
    vit = small_vit()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises((leanvit.ConfigError, leanvit.ExportError), match=message):
        leanvit.export(vit, tmp_path / name, **{"images": photos(vit), **options})
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.onnx"]


def test_another_kind_of_model_and_images_of_another_size(tmp_path):
    with pytest.raises(leanvit.UnsupportedModelError, match="Linear is not supported"):
        leanvit.export(torch.nn.Linear(1, 1), tmp_path / "x.onnx")
    with pytest.raises(leanvit.InputSizeError, match="48x48 does not fit a model made for 32x32"):
        leanvit.export(small_vit(), tmp_path / "x.onnx", images=torch.zeros(1, 3, 48, 48))


def test_a_size_that_a_method_fixes(tmp_path):
    model = leanvit.slim(small_vit(dynamic_img_size=True), leanvit.GLAD(at=2))
    with pytest.raises(leanvit.ExportError, match=r"dynamic size: glad:at=2 is made for one image size"):
        leanvit.export(model, tmp_path / "x.onnx", dynamic_size=True)


def test_a_batch_size_that_a_model_fixes(tmp_path):
    vit = small_vit()
    vit.fc_norm.forward = lambda x: x * len(x)  # what freezes it
    leanvit.export(vit, tmp_path / "x.pt2", images=photos(vit), dynamic_batch=False)
    with pytest.raises(leanvit.ExportError, match=r"cannot export.*dynamic_batch=False, --no-dynamic-batch"):
        leanvit.export(vit, tmp_path / "y.pt2", images=photos(vit))


def test_a_file_that_exists(tmp_path):
    (tmp_path / "x.onnx").write_text("here")
    with pytest.raises(leanvit.ConfigError, match=r"x\.onnx exists; overwrite it \(overwrite=True, --overwrite\)"):
        leanvit.export(small_vit(), tmp_path / "x.onnx")


def test_weights_of_half_precision(tmp_path):
    with pytest.raises(leanvit.ExportError, match=r"torch\.bfloat16; export takes torch\.float32"):
        leanvit.export(small_vit().bfloat16(), tmp_path / "x.onnx")


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr("leanvit.engines.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(leanvit.ConfigError, match=r"onnxscript is missing: pip install 'leanvit\[onnx\]'"):
        leanvit.export(small_vit(), tmp_path / "x.onnx")


# ---- the command


def test_command(tmp_path):
    vit = small_vit()
    leanvit.save(leanvit.slim(vit, leanvit.GLAD(at=2)), tmp_path / "saved")
    arguments = ["export", str(tmp_path / "saved"), "--output", str(tmp_path / "x.onnx")]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "is not deployed: its deployed form is exported" in " ".join(run.stderr.split())
    assert "largest difference from torch" in run.stdout and "on 8 images" in " ".join(run.stdout.split())
    assert (tmp_path / "x.onnx").exists()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert export_function is leanvit.export
