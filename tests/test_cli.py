"""The commands: what they print and write, and that each bad input gets one line and exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from leanvit import GLAD, slim
from leanvit.cli import app
from leanvit.cli.options import Teaching, Training
from leanvit.cli.training import slowdowns
from leanvit.data import open_data
from leanvit.measure import evaluate
from leanvit.report.tables import read_csv
from leanvit.store import load, read_config, save
from leanvit.train import TrainConfig

COMMANDS = (
    *("analyse", "bench", "compare", "count", "demo", "doctor", "eval"),
    *("explain", "export", "pareto", "report", "slim", "train", "usage"),
)
QUICK = ("-b", "1", "--num-bench-iter", "1", "--threads", "1")
SHORT = ("--epochs", "1", "-b", "4", "--device", "cpu", "--warm-start-steps", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of train/ and val/, each with two noise images of three classes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ViT of three classes and six blocks that computes next to nothing."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 6, "num_heads": 3, "num_classes": 3}
    return save(timm.create_model("vit_tiny_patch16_224", **sizes), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def lean(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(slim(load(dense), GLAD()), tmp_path_factory.mktemp("models") / "lean")


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed here is of no interest."""
    timing = sys.modules["leanvit.bench"]  # the name leanvit.bench is the function
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST", 1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="leanvit")


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """The one line that a mistake gets."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("leanvit: error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_option(command: str) -> None:
    text = succeed(*command.split(), "--help")
    options = [line for line in text.splitlines() if line.startswith("  -")]
    assert options and all(len(line) <= 80 for line in text.splitlines())
    if not command:
        assert all(f"\n  {name} " in text for name in COMMANDS)


def test_version() -> None:
    assert succeed("--version").startswith("leanvit ")


def test_installed_command_refuses_in_one_line_without_a_traceback() -> None:
    command = [sys.executable, "-m", "leanvit", "eval", "no_such_vit", "--data-dir", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.startswith("leanvit: error: ") and done.stderr.count("\n") == 1
    assert "no_such_vit" in done.stderr


def test_a_warning_is_one_line(dense: Path) -> None:
    command = [sys.executable, "-m", "leanvit", "bench", str(dense), "--method", "adavit", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    assert "leanvit: adavit: what it costs depends on the image" in done.stderr and ".py" not in done.stderr


# ---- measuring


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("leanvit.measure.environment", interrupt)
    result = run("doctor")
    assert result.exit_code == 130 and result.stderr == "leanvit: error: interrupted\n"


def test_analyse_is_for_dense_models(lean: Path, photos: Path) -> None:
    assert "the model is lean already" in refuse("analyse", lean, "--data-dir", photos)


def test_bench_says_which_form_of_sparse_attention_runs(dense: Path) -> None:
    result = run("bench", dense, "--method", "sparsifiner:keep=0.5", *QUICK)
    assert "sparsifiner:keep=0.5: sparsifiner runs as a mask on scaled_dot_product_attention" in result.stderr


def test_figures_can_go_to_what_is_no_file(dense: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    succeed("count", dense, "--json", pipe)
    assert json.loads(reader.communicate(timeout=60)[0])["command"] == "count" and pipe.is_fifo()


def test_eval_prints_and_writes_the_figures(dense: Path, photos: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "new" / "a.json", "--results-file", tmp_path / "a.csv")
    text = succeed("eval", dense, "--data-dir", photos, "--teacher", dense, *files)
    assert "top-1" in text
    (row,) = read_csv(tmp_path / "a.csv")
    assert row["model"] == str(dense) and row["agreement"] == 100 and 0 <= row["top1"] <= 100
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert written["command"] == "eval" and written["settings"]["batch_size"] == 50
    assert written["environment"]["processor"] and written["environment"]["versions"]["torch"]
    assert written["rows"][0]["top1"] == pytest.approx(row["top1"], abs=1e-3)


def test_count_and_analyse(dense: Path, photos: Path, tmp_path: Path) -> None:
    """MACs by layer and kind add up to the total; the statistics have a row a layer."""
    succeed("count", dense, "--method", "glad:at=2", "--json", tmp_path / "count.json")
    rows = {row["layer"]: row["gmacs"] for row in json.loads((tmp_path / "count.json").read_text())["rows"]}
    kinds = sum(value for name, value in rows.items() if name.startswith("all "))
    layers = sum(value for name, value in rows.items() if not name.startswith("all ")) - rows["total"]
    assert kinds == pytest.approx(rows["total"]) == pytest.approx(layers) and rows["total"] > 0
    assert "effective rank" in succeed("analyse", dense, "--data-dir", photos)


def test_eval_crops_as_told(dense: Path, photos: Path, tmp_path: Path) -> None:
    succeed("eval", dense, "--data-dir", photos, "--crop-pct", "1.0", "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["crop_pct"] == 1.0
    assert "--crop-pct" in refuse("eval", dense, "--data-dir", photos, "--crop-pct", "2")


def test_eval_of_published_weights_needs_no_other_option(shared_data: Path, tmp_path: Path) -> None:
    weights = shared_data / "deit_tiny_patch16_224.safetensors"
    data = ("--data-dir", shared_data / "imagenet-500.tar", "--results-file", tmp_path / "a.csv")
    assert "500 images" in succeed("eval", "deit_tiny_patch16_224", "--checkpoint", weights, *data)
    assert read_csv(tmp_path / "a.csv")[0]["top1"] > 75


def test_bench_times_methods_beside_the_dense_model(dense: Path, tmp_path: Path) -> None:
    table = tmp_path / "speed.csv"
    succeed(
        "bench",
        dense,
        "--method",
        "glad",
        "--method",
        "dgssa:layers=0,1+glad",
        *QUICK,
        "--results-file",
        table,
    )
    rows = read_csv(table)
    assert [row["model"] for row in rows] == ["dense", "glad", "dgssa:layers=0,1+glad"]
    assert rows[2]["infer_gmacs"] < rows[0]["infer_gmacs"]


def test_bench_of_a_lean_model_has_its_dense_twin_beside_it(lean: Path, tmp_path: Path) -> None:
    table = tmp_path / "speed.csv"
    succeed("bench", lean, *QUICK, "--precision", "bf16", "--results-file", table)
    dense_row, lean_row = read_csv(table)
    assert dense_row["method"] == "dense" and lean_row["method"].startswith("glad")
    assert lean_row["infer_gmacs"] < dense_row["infer_gmacs"]


def test_compare_puts_accuracy_and_speed_in_one_table(dense: Path, lean: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "both.csv"
    succeed("compare", dense, lean, "--data-dir", photos, *QUICK, "--results-file", table)
    rows = read_csv(table)
    assert [row["model"] for row in rows] == ["dense", "lean"]
    assert rows[1]["agreement"] is not None and rows[1]["speedup"] > 0


def test_compare_gives_each_model_images_of_its_own(dense: Path, photos: Path, tmp_path: Path) -> None:
    other = load(dense)
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.0, 0.0, 0.0), "std": (0.1, 0.1, 0.1)}
    images = open_data(photos, other, split="val")
    save(other, tmp_path / "other")
    both = ("compare", dense, tmp_path / "other", "--data-dir", photos, *QUICK)
    succeed(*both, "--val-split", "val", "--results-file", tmp_path / "both.csv")
    expected = evaluate(other, images, progress=False).top1
    assert read_csv(tmp_path / "both.csv")[1]["top1"] == pytest.approx(expected, abs=1e-3)
    other.set_input_size((48, 48))
    save(other, tmp_path / "other", overwrite=True)
    assert "the teacher takes 32×32, the student 48×48" in refuse(*both)


def test_doctor(tmp_path: Path) -> None:
    text = succeed("doctor", "--json", tmp_path / "doctor.json")
    assert "processor" in text and "onednn" in text and "tensorboard" in text
    assert json.loads((tmp_path / "doctor.json").read_text())["environment"]["versions"]["timm"]


# ---- training


def test_slim_makes_a_run_that_other_commands_take(dense: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    arguments = (
        "slim",
        dense,
        "--method",
        "dgssa:layers=auto:2+glad",
        "--data-dir",
        photos,
        "--output",
        folder,
    )
    text = succeed(*arguments, *SHORT)
    assert "speedup" in text
    assert load(folder / "deployed").lean.deployed and not load(folder / "last").lean.deployed
    assert next(row["method"] for row in read_csv(folder / "results.csv")) == "dense"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for saved in ("best", "deployed"):
        assert read_config(folder / saved)["label_names"] == ["ant", "bee", "cat"]
    assert json.loads((folder / "results.json").read_text())["settings"]["epochs"] == 1
    assert "is not empty" in refuse(*arguments, *SHORT)
    assert "lr was" in refuse(*arguments, *SHORT, "--resume", "--lr", "0.5")
    succeed(*arguments, *SHORT, "--resume")
    succeed("eval", folder, "--data-dir", photos)


def test_slim_without_labels_only_warm_starts(dense: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("slim", dense, "--method", "glad", "--data-dir", photos / "train" / "ant")
    result = run(*arguments, "--warm-start-steps", "1", "--output", tmp_path, "--experiment", "b")
    assert result.exit_code == 0, result.output
    assert "no images were held out" in result.stderr
    assert load(tmp_path / "b" / "last").lean.methods[0].name == "glad"


def test_train_takes_the_number_of_classes_from_the_data(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 7}
    base = save(timm.create_model("vit_tiny_patch16_224", **sizes), tmp_path / "base")
    succeed("train", base, "--data-dir", photos, "--output", tmp_path / "run", "--epochs", "1", "-b", "4")
    assert load(tmp_path / "run" / "best").num_classes == 3
    assert read_csv(tmp_path / "run" / "results.csv")[0]["top1"] is not None


def test_config_file_gives_defaults_and_the_command_line_wins(dense: Path, photos: Path, tmp_path: Path) -> None:
    settings = {
        "epochs": 1,
        "batch-size": 4,
        "lr": 1e-5,
        "scale": [0.5, 1.0],
        "model_ema": True,
        "output": str(tmp_path / "run"),
        "warm-start-steps": 0,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    succeed("slim", dense, "-c", tmp_path / "c.yaml", "--method", "glad", "--data-dir", photos, "--lr", "2e-5")
    used = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (used["lr"], used["batch_size"], used["scale"], used["model_ema"]) == (2e-5, 4, [0.5, 1.0], True)


def test_training_options_have_the_defaults_of_the_library() -> None:
    assert Training().config(epochs=10, **vars(Teaching())) == TrainConfig()


def test_every_training_setting_is_an_option_of_slim() -> None:
    options = {field.name for group in (Training, Teaching) for field in dataclasses.fields(group)}
    assert {field.name for field in dataclasses.fields(TrainConfig)} - options == {"epochs"}  # epochs has its own


def test_slim_and_train_take_a_class_map(dense: Path, photos: Path, tmp_path: Path) -> None:
    """Two of the three classes have images; both commands train and measure with the map's labels."""
    for split in ("train", "val"):
        for name in ("ant", "cat"):
            shutil.copytree(photos / split / name, tmp_path / "two" / split / name)
    (tmp_path / "map.txt").write_text("ant\nbee\ncat\n")
    data = ("--data-dir", tmp_path / "two")
    command = ("slim", dense, "--method", "glad", "--kd-weight", "0.3", "--token-weight", "0", "--kd-temperature", "2")
    assert "use a class map" in refuse(*command, *data, *SHORT, "--output", tmp_path / "none")
    mapped = (*data, "--class-map", tmp_path / "map.txt", "--output")
    succeed(*command, *mapped, tmp_path / "slim", *SHORT)
    used = yaml.safe_load((tmp_path / "slim" / "args.yaml").read_text())
    assert [used[name] for name in Teaching.__dataclass_fields__] == [0.3, 0.0, 2.0]
    succeed("train", dense, *mapped, tmp_path / "train", "--epochs", "1", "-b", "4")
    assert read_config(tmp_path / "train" / "best")["label_names"] == ["ant", "bee", "cat"]


# ---- bad input


def test_usage_errors_are_one_line(dense: Path) -> None:
    assert "Missing argument 'MODEL'" in refuse("eval")
    assert "--data-dir" in refuse("eval", dense)
    assert "--no-such" in refuse("bench", dense, "--no-such")
    assert "--precision" in refuse("bench", dense, "--precision", "fp8")
    assert "nothing" in refuse("nothing")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--method", "castle"), "unknown method 'castle'; known are "),
        (("--method", "glad:keeps=0.5"), "glad has no parameter 'keeps'"),
        (("--method", "glad:keep=2"), "keep=2"),
        (("--method", "dgssa:layers=9"), "block 9 does not exist"),
        (("--method", "dgssa:layers=auto:5+glad"), "only 3 come before"),
        (("--method", "dgssa:layers=4+glad"), "dgssa"),
        (("--method", "glad", "--lr", "-1"), "lr must be above 0"),
        (("--method", "glad", "--opt", "adamx"), "adamx"),
        (("--method", "glad", "--device", "tpu9"), "tpu9"),
        (("--method", "glad", "--track", "nobody"), "nobody"),
        (("--method", "glad", "--img-size", "33"), "33"),
        (("--method", "glad", "--train-split", "nowhere"), "nowhere"),
        (("--method", "glad", "--hflip", "7"), "hflip must be between 0 and 1, got 7.0"),
        (("--method", "glad", "--epochs", "1", "--aa", "foo"), "timm does not know this augmentation"),
    ],
)
def test_slim_refuses(
    dense: Path,
    photos: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leanvit.warmstart.warm_start", lambda *_, **__: pytest.fail("found too late"))
    folder = tmp_path / "run"
    quick = ("--warm-start-steps", "0", "--output", folder)
    assert expected in refuse("slim", dense, "--data-dir", photos, *quick, *arguments)
    assert not (folder / "last").exists() and not (folder / "deployed").exists()


def test_a_teacher_that_does_not_fit_is_refused_before_the_warm_start(
    dense: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanvit.warmstart.warm_start", lambda *_, **__: pytest.fail("found too late"))
    larger = load(dense)
    larger.set_input_size((48, 48))
    command = ("slim", dense, "--method", "glad", "--data-dir", photos, "--epochs", "1", "--output", tmp_path / "run")
    teacher = ("--teacher", save(larger, tmp_path / "larger"))
    assert "the teacher takes 48×48, the student 32×32" in refuse(*command, *teacher)


def test_a_trained_run_is_not_resumed_without_its_epochs(dense: Path, photos: Path, tmp_path: Path) -> None:
    common = ("slim", dense, "--method", "glad", "--data-dir", photos, "--output", tmp_path / "run", *SHORT[2:])
    succeed(*common, "--epochs", "1")
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    assert "holds a run that was trained; give the --epochs it had" in refuse(*common, "--resume")
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("command", "file"), [("pareto", "results.csv"), ("usage", "usage.json")])
def test_results_that_are_there_are_replaced_only_when_told(
    command: str, file: str, dense: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / file).touch()
    line = refuse(command, dense, "--data-dir", photos, "--output", tmp_path)
    assert f"holds {file} already; give another --output, or --overwrite" in line


def test_slim_says_where_it_is_slower_than_dense() -> None:
    point = {"infer_batch_size": 1, "precision": "fp32", "engine": "torch", "infer_gmacs": 1.144}
    rows = [{"model": "dense", "speedup": 1.0, **point}, {"model": "castling", "speedup": 0.82, **point}]
    assert slowdowns(rows) == ["slower than dense: castling at batch 1, fp32, torch (0.82×); its MACs are 1.14 G"]
    assert slowdowns([{**rows[1], "speedup": 1.2}, {"model": "no speed"}]) == []


def test_data_that_does_not_fit_is_refused(dense: Path, photos: Path, tmp_path: Path) -> None:
    assert "nowhere" in refuse("eval", dense, "--data-dir", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in refuse("eval", dense, "--data-dir", tmp_path / "empty")
    assert "classes" in refuse("eval", dense, "--data-dir", "digits")
    (tmp_path / "broken.tar").write_bytes(b"no tar at all")
    assert "broken.tar" in refuse("eval", dense, "--data-dir", tmp_path / "broken.tar")


def test_weights_that_do_not_fit_are_refused(dense: Path, photos: Path, tmp_path: Path) -> None:
    evaluate = ("eval", "deit_tiny_patch16_224", "--data-dir", photos, "--checkpoint")
    assert "missing.safetensors" in refuse(*evaluate, tmp_path / "missing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:1000])
    assert "cut.safetensors" in refuse(*evaluate, tmp_path / "cut.safetensors")
    torch.save({}, tmp_path / "pickle.pth")
    assert "pickle.pth" in refuse(*evaluate, tmp_path / "pickle.pth")
    message = refuse(*evaluate, dense / "model.safetensors")
    assert "192" in message and "12" in message


def test_files_that_cannot_be_written_are_refused_before_the_work(dense: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--json", "--results-file"):
        assert "a folder" in refuse("eval", dense, "--data-dir", photos, option, tmp_path)
        assert "is a file" in refuse("eval", dense, "--data-dir", photos, option, tmp_path / "file" / "x")
    slim_into_file = ("slim", dense, "--data-dir", photos, "--method", "glad", "--output", tmp_path / "file")
    assert "is a file" in refuse(*slim_into_file)
    assert "file" in refuse("demo", "--output", tmp_path / "file")


def test_a_save_that_fails_is_one_line(
    dense: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("leanvit.store.save_file", full)
    command = ("slim", dense, "--data-dir", photos, "--method", "glad", "--warm-start-steps", "0")
    result = run(*command, "--output", tmp_path / "run")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"leanvit: error: cannot save to {tmp_path / 'run' / 'last'}: No space left on device"
    assert not list((tmp_path / "run").glob("*"))


def test_a_model_of_a_newer_version_is_one_line(lean: Path, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lean, tmp_path / "newer"))
    config = json.loads((folder / "config.json").read_text())
    config["leanvit"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    assert "has version 99, this leanvit reads up to 1; upgrade it" in refuse("eval", folder, "--data-dir", photos)


def test_config_files_that_cannot_be_read_are_refused(dense: Path, photos: Path, tmp_path: Path) -> None:
    command = ("slim", dense, "--method", "glad", "--data-dir", photos, "-c")
    assert "missing.yaml" in refuse(*command, tmp_path / "missing.yaml")
    for text, expected in {
        "speed: 3": "'speed', which is no option of slim",
        "- 1\n- 2": "option: value",
        "a: [": "not YAML",
        "lr: fast": "lr",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        assert expected in refuse(*command, tmp_path / "c.yaml")


def test_a_lean_model_takes_no_more_methods(lean: Path) -> None:
    assert "is lean already (glad" in refuse("bench", lean, "--method", "glad")
