"""Training: it learns, a resumed run is the same run, and what cannot work is refused by name."""

from __future__ import annotations

import copy
import csv
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import leanvit
from leanvit.data import data_config, loader
from leanvit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputSizeError,
    TrainingDiverged,
    UnsupportedModelError,
)
from leanvit.objective import Objective, Teacher, distillation_loss
from leanvit.runs import RunFolder
from leanvit.store import load
from leanvit.train import TrainConfig, TrainResult, _Training, distill, train

METHODS = (leanvit.DGSSA(layers=(0, 1)), leanvit.GLAD(at=(2,)))
MEASURED = ("images_per_second",)


@pytest.fixture(autouse=True)
def one_thread():
    """More than one costs these small models more than it gives, and on a busy machine far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Images(Dataset):
    """Random images whose label is in their brightness; the `stop`-th one that is asked for is not given."""

    def __init__(self, count: int = 32, stop: int | None = None, end=None, value: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % 10
        self.images = torch.randn(count, 3, 32, 32, generator=generator) + self.labels.view(-1, 1, 1, 1) / 3
        self.left, self.end, self.value = stop, end, value

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                if self.value is None:
                    self.end()
                return torch.full_like(self.images[index], self.value), int(self.labels[index])
        noise = torch.randn(3, 1, 1) / 10  # augmentation, from the generator that an epoch seeds
        return self.images[index] + noise, int(self.labels[index])


class Still(Images):
    """The same without augmentation."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Unlabelled(Images):
    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def tiny_model(**changes) -> nn.Module:
    """The model of the fixture `tiny_vit`, for another process."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **changes})


def interrupt() -> None:
    raise InterruptedError


def losses(result: TrainResult) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in result.history]


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value or 0) for name, value in row.items()}


def fit(model, data=None, val_data=None, **options) -> TrainResult:
    options = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "progress": False, **options}
    return train(model, data or Images(), val_data, **options)


def test_learns_digits_from_the_path_alone(tiny_vit):
    result = train(tiny_vit, "digits", epochs=3, batch_size=16, lr=5e-4, scale=(0.9, 1.0), progress=False)
    assert result.model is tiny_vit and not tiny_vit.training
    assert result.best["val_top1"] > 25
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_distills_into_a_deployable_model(tiny_vit, tmp_path):
    fit(tiny_vit, epochs=2)
    before = copy.deepcopy(tiny_vit.state_dict())
    lean = leanvit.slim(tiny_vit, *METHODS)
    result = distill(
        lean, tiny_vit, Images(), Images(), epochs=2, batch_size=16, output=tmp_path / "run", progress=False
    )
    first = result.history[0]
    terms = {"train_ce", "train_kd", "train_tokens", "train_dgssa_guidance"}
    assert terms <= first.keys() and all(first[name] > 0 for name in terms)
    assert sum(first[name] for name in terms) == pytest.approx(first["train_loss"], rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in tiny_vit.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(leanvit.deploy(lean)(images), lean(images), atol=1e-4, rtol=0)
    torch.testing.assert_close(load(tmp_path / "run" / "best")(images), lean(images))


def test_run_folder_has_what_the_conventions_say(tiny_vit, tmp_path):
    result = fit(tiny_vit, val_data=Images(), output=tmp_path, epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "args.yaml", "metrics.csv", "summary.csv", "last", "best", "checkpoint-2", "checkpoint-3",
    }  # fmt: skip
    table = read_rows(tmp_path)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert float(table[1]["train_loss"]) == result.history[1]["train_loss"]
    assert (tmp_path / "summary.csv").read_text().startswith("epoch,train_loss,eval_top1,lr\n")


@pytest.mark.parametrize(
    "options", [{}, {"model_ema": True, "mixup": 0.5, "opt": "muon", "grad_accum_steps": 2, "amp": "bf16"}]
)
def test_resumed_run_is_the_uninterrupted_run(tiny_vit, tmp_path, options):
    lean = leanvit.slim(tiny_vit, *METHODS)
    runs = {"batch_size": 8, "epochs": 3, "progress": False, **options}
    whole = distill(copy.deepcopy(lean), tiny_vit, Images(), Images(), output=tmp_path / "whole", **runs)
    broken = tmp_path / "broken"
    with pytest.raises(InterruptedError):  # in the middle of the second epoch
        distill(copy.deepcopy(lean), tiny_vit, Images(stop=48, end=interrupt), Images(), output=broken, **runs)
    resumed = distill(lean, tiny_vit, Images(), Images(), output=broken, resume=True, **runs)
    assert losses(resumed) == losses(whole)
    weights = whole.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in resumed.model.state_dict().items())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_train import Images, fit, tiny_model
killer = lambda: os.kill(os.getpid(), signal.SIGKILL)
fit(tiny_model(), Images(stop=48, end=killer), epochs=3, output=sys.argv[1])
"""


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(Path(leanvit.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_run_killed_in_mid_epoch_resumes_to_the_same_losses(tiny_vit, tmp_path):
    whole = fit(copy.deepcopy(tiny_vit), epochs=3)
    killed = python("-c", KILLED, tmp_path, Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    for weight in tiny_vit.parameters():  # the checkpoint decides, not what is passed in
        weight.data.zero_()
    resumed = fit(tiny_vit, epochs=3, output=tmp_path, resume=True)
    for row, wanted in zip(losses(resumed), losses(whole), strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)  # the killed process had another number of threads


def test_finished_run_resumes_to_its_result_and_mends_its_folder(tiny_vit, tmp_path):
    whole = fit(copy.deepcopy(tiny_vit), val_data=Images(), output=tmp_path)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    again = fit(tiny_vit, val_data=Images(), output=tmp_path, resume=True)
    assert again.history == whole.history and len(read_rows(tmp_path)) == 2
    assert not (tmp_path / ".checkpoint-9.tmp").exists()
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in whole.model.state_dict().items())


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny_vit, tmp_path):
    assert len(fit(tiny_vit, output=tmp_path, resume=True, epochs=1).history) == 1


def test_resume_with_other_settings_names_them(tiny_vit, tmp_path):
    fit(tiny_vit, output=tmp_path, epochs=1)
    with pytest.raises(ConfigError, match=r"other settings: epochs was 1, now 2; lr was 0\.001, now 0\.002"):
        fit(tiny_vit, output=tmp_path, resume=True, lr=2e-3, epochs=2)
    with pytest.raises(ConfigError, match="method was None, now 'dgssa:layers=0'"):
        fit(leanvit.slim(tiny_vit, leanvit.DGSSA(layers=(0,))), output=tmp_path, resume=True, epochs=1)


def test_run_is_not_overwritten(tiny_vit, tmp_path):
    fit(tiny_vit, output=tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="holds a run already; resume it"):
        fit(tiny_vit, output=tmp_path, epochs=1)


def test_damaged_checkpoint_is_named(tiny_vit, tmp_path):
    fit(tiny_vit, output=tmp_path, epochs=1)
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint-1 cannot be resumed from"):
        fit(tiny_vit, output=tmp_path, resume=True, epochs=1)


def test_optimiser_state_is_never_unpickled(tiny_vit, tmp_path):
    fit(tiny_vit, output=tmp_path, epochs=1)
    torch.save({"run": Images}, tmp_path / "checkpoint-1" / "optimizer.bin")
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        fit(tiny_vit, output=tmp_path, resume=True, epochs=1)


def test_loss_that_is_not_finite_stops_the_run_with_its_step(tiny_vit, tmp_path):
    data = Images(stop=32 + 17, value=float("nan"))  # the second batch of the second epoch
    with pytest.raises(TrainingDiverged, match=r"not finite at step 4 of 6: loss nan, ce nan; .*checkpoint-1$"):
        fit(tiny_vit, data, epochs=3, output=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_full_disk_leaves_nothing_half_written(tmp_path):
    folder = RunFolder(tmp_path, {"lr": 1.0}, resume=False)
    folder.start()
    with pytest.raises(CheckpointError, match="No space left on device"):
        with folder.writing(1) as path:
            (path / "weights").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["args.yaml"]


def test_output_that_cannot_be_written_is_named_before_training(tiny_vit, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        fit(tiny_vit, output=tmp_path / "file")
    with pytest.raises(CheckpointError, match="run cannot be written"):
        fit(tiny_vit, output=tmp_path / "file" / "run")


def distill_twice(output: Path, batch_size: int) -> None:
    """A run from the beginning, and the same resumed at its end."""
    # The guidance loss takes the mean attention over a process's own images, not over the joint batch.
    methods = leanvit.DGSSA(layers=(0, 1), guidance_weight=0), leanvit.GLAD(at=(2,))
    options = {"epochs": 2, "batch_size": batch_size, "output": output, "progress": False, "device": "cpu"}
    first, again = (
        distill(leanvit.slim(tiny_model(), *methods), tiny_model(), Still(30), Still(29), resume=resume, **options)
        for resume in (False, True)
    )
    assert losses(first) == losses(again)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import test_train\n"
        "test_train.distill_twice(pathlib.Path(sys.argv[1]), batch_size=4)\n"
    )
    # What `accelerate launch` runs for several GPUs; for several processes on one CPU it starts only one.
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = python(*launch, script, tmp_path / "two", Path(__file__).parent)
    assert two.returncode == 0, two.stderr
    assert "processes: 2" in (tmp_path / "two" / "args.yaml").read_text()
    distill_twice(tmp_path / "one", batch_size=8)
    for row, wanted in zip(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"), strict=True):
        assert numbers(row) == pytest.approx(numbers(wanted), rel=1e-4)


def test_accumulated_batches_make_the_update_of_one(tiny_vit):
    once, twice = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit)
    fit(once, Still(), opt="sgd", batch_size=16, epochs=1)
    fit(twice, Still(), opt="sgd", batch_size=8, grad_accum_steps=2, epochs=1)
    for weight, wanted in zip(twice.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-4)


def test_an_update_of_fewer_batches_at_an_epochs_end_counts_in_full(tiny_vit):
    whole, rest = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit)
    fit(whole, Still(16), opt="sgd", grad_accum_steps=1, epochs=1)
    fit(rest, Still(16), opt="sgd", grad_accum_steps=3, epochs=1)
    for weight, wanted in zip(rest.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted)


@pytest.mark.parametrize("damaged", [range(8), range(24, 32)])
def test_a_batch_of_damaged_images_is_a_step_all_the_same(tiny_vit, damaged, monkeypatch):
    """Left out, it would leave another process waiting, or an epoch without its last update."""
    as_they_lie = lambda *data, shuffle=False, **options: loader(*data, **options)  # noqa: E731
    monkeypatch.setattr(sys.modules["leanvit.train"], "loader", as_they_lie)

    class Damaged(Still):
        def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
            return None if index in damaged else super().__getitem__(index)

    training = _Training(
        tiny_vit, None, Damaged(), None, TrainConfig(epochs=2, batch_size=8, grad_accum_steps=3), None, False, False
    )
    result = training.run()
    assert training.updates == training.total_updates == 4
    assert all(row["train_loss"] > 0 for row in result.history)


def test_inherited_weights_have_their_own_learning_rate(tiny_vit):
    lean = leanvit.slim(tiny_vit, *METHODS)
    before = copy.deepcopy(lean.state_dict())
    fit(lean, inherited_lr_scale=0.0, epochs=1)
    new = lean.new_parameter_names()
    changed = {key for key, value in lean.named_parameters() if not torch.equal(before[key], value)}
    assert new and changed == new


def test_seed_decides_the_run(tiny_vit):
    first, second, other = (losses(fit(copy.deepcopy(tiny_vit), epochs=1, seed=seed)) for seed in (0, 0, 1))
    assert first == second != other


def test_tensorboard_gets_the_rows(tiny_vit, tmp_path):
    pytest.importorskip("tensorboard")
    fit(tiny_vit, output=tmp_path, epochs=1, track=("tensorboard",))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_objective_is_the_sum_of_its_terms(tiny_vit):
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    lean = leanvit.slim(tiny_vit, *METHODS).eval()
    logits, tokens = Teacher(tiny_vit, lean, tokens=True)(images)
    terms = Objective(lean, kd_weight=0.5, token_weight=0.25)(images, labels, logits, tokens)
    seen = lean.forward_tokens(images, track=True)
    own = lean(images).log_softmax(-1)
    torch.testing.assert_close(terms["ce"], F.nll_loss(own, labels))
    divergence = (logits.softmax(-1) * (logits.log_softmax(-1) - own)).sum(-1).mean()
    torch.testing.assert_close(terms["kd"], 0.5 * divergence)
    torch.testing.assert_close(terms["tokens"], 0.25 * (seen.x - seen.reduce(tokens)).square().mean())
    torch.testing.assert_close(terms["loss"], terms["ce"] + terms["kd"] + terms["tokens"])
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]


def test_distillation_loss_vanishes_for_equal_logits_at_any_temperature():
    logits = torch.randn(3, 5)
    assert distillation_loss(logits, logits, temperature=3.0).abs() < 1e-6
    assert distillation_loss(logits, -logits, temperature=3.0) > 0


def test_teacher_sees_images_in_its_own_normalisation(tiny_vit):
    student = leanvit.slim(tiny_vit)
    tiny_vit.pretrained_cfg = {
        **tiny_vit.pretrained_cfg,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    assert data_config(student)["mean"] != data_config(tiny_vit)["mean"]
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(data_config(student)[key]).view(3, 1, 1) for key in ("mean", "std"))
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    logits, _ = Teacher(tiny_vit, student, tokens=False)((pixels - mean) / std)
    torch.testing.assert_close(logits, tiny_vit((pixels - own_mean) / own_std))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 96}, "the teacher has width 96, the student 48; use token_weight=0"),
        ({"patch_size": 16}, r"patch grid \(2, 2\), the student \(4, 4\)"),
        ({"num_classes": 7}, "the teacher has 7 classes, the student 10"),
        ({"img_size": 48}, "the teacher takes 48×48, the student 32×32"),
    ],
)
def test_teacher_that_does_not_fit_is_refused(tiny_vit, changes, message):
    with pytest.raises(ConfigError, match=message):
        distill(leanvit.slim(tiny_vit), tiny_model(**changes), Images(), progress=False)


def test_any_teacher_will_do_without_tokens(tiny_vit):
    teacher = timm.create_model("resnet10t", num_classes=10)
    with pytest.raises(ConfigError, match="a ResNet, has no dense tokens"):
        distill(leanvit.slim(tiny_vit), teacher, Images(), progress=False)
    result = distill(tiny_vit, teacher, Images(), epochs=1, batch_size=16, token_weight=0, progress=False)
    assert "train_kd" in result.history[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"amp": "fp8"}, "amp must be 'bf16', 'fp16' or empty, got 'fp8'"),
        ({"opt": "adamv"}, "opt must be an optimiser of timm, the nearest .*adam"),
        ({"sched": "plateau"}, "sched must be one of cosine"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        ({"epochs": 1, "warmup_epochs": 2}, "warmup_epochs must be at most epochs=1"),
        ({"batch_size": 3, "cutmix": 1.0}, "batch_size must be even for mixup .* got 3"),
        ({"learning_rate": 1e-3}, "no training option 'learning_rate'"),
        ({"epochs": "3"}, "epochs must be int, got '3'"),
        ({"hflip": "often"}, "hflip must be float or None, got 'often'"),
        ({"hflip": 7.0}, "hflip must be between 0 and 1, got 7.0"),
        ({"reprob": -3.0}, "reprob must be between 0 and 1, got -3.0"),
        ({"color_jitter": -1.0}, "color_jitter must be at least 0, got -1.0"),
        ({"scale": (2.0, 3.0)}, r"scale must be two shares .* got \(2.0, 3.0\)"),
        ({"scale": (0.5,)}, r"scale must be two shares .* got \(0.5,\)"),
    ],
)
def test_config_refuses_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(None, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp": "fp16", "device": "cpu"}, "fp16 is not for training on a CPU"),
        ({"device": "mps"}, "device 'mps' is not there"),
        ({"track": ("clearly",), "output": "x"}, "tracker 'clearly' is not known or not installed"),
        ({"track": ("tensorboard",)}, "trackers write into the run's folder"),
        ({"hflip": 0.0}, "hflip: a data set brings its own augmentation"),
    ],
)
def test_training_refuses_by_name(tiny_vit, options, message):
    with pytest.raises(ConfigError, match=message):
        fit(tiny_vit, **options)


def test_an_empty_data_set_is_refused(tiny_vit):
    empty = Subset(Images(), [])
    for arguments in ((empty,), (Images(), empty)):
        with pytest.raises(ConfigError, match="Subset is empty or has no length"):
            train(tiny_vit, *arguments, progress=False)


def test_a_loader_is_refused(tiny_vit):
    for arguments in ((DataLoader(Images()),), (Images(), DataLoader(Images()))):
        with pytest.raises(DataError, match="a path or a data set, not a DataLoader"):
            train(tiny_vit, *arguments, progress=False)


def test_resuming_with_another_teacher_is_refused(tiny_vit, tmp_path):
    lean = leanvit.slim(tiny_vit)
    options = {"output": tmp_path, "epochs": 1, "batch_size": 16, "progress": False}
    distill(lean, tiny_vit, Images(), **options)
    other = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        other.head.bias[0] += 1
    with pytest.raises(ConfigError, match=r"teacher_weights was '[0-9a-f]{16}', now '[0-9a-f]{16}'"):
        distill(lean, other, Images(), resume=True, **options)


def test_a_setting_that_an_earlier_version_did_not_write_is_no_difference(tmp_path):
    folder = RunFolder(tmp_path, {"lr": 1e-3}, resume=False)
    folder.start()
    (tmp_path / "checkpoint-1").mkdir()
    RunFolder(tmp_path, {"lr": 1e-3, "class_map": ""}, resume=True)
    with pytest.raises(ConfigError, match=r"lr was 0.001, now 0.1$"):
        RunFolder(tmp_path, {"lr": 0.1, "class_map": ""}, resume=True)


def test_deployed_model_is_refused(tiny_vit):
    deployed = leanvit.deploy(leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,))))
    with pytest.raises(ConfigError, match="no weights to train"):
        fit(deployed)


def test_epochs_before_the_targets_are_reached_are_not_kept():
    """While next to nothing is skipped yet, the accuracy is that of another model."""
    lean = leanvit.slim(tiny_model(), leanvit.AdaViT(ramp=0.5))
    training = _Training(lean, None, Images(), None, TrainConfig(epochs=4), None, False, False)
    for top1, best in ((90.0, 1), (80.0, 2), (70.0, 2), (75.0, 2)):
        training.history.append({"epoch": len(training.history) + 1, "val_top1": top1})
        assert training.best["epoch"] == best
    for block in lean.blocks[1:]:  # after a warm start they aim at the targets from the first epoch on
        block.decide.begin.copy_(torch.tensor(block.decide.config.targets))
    assert training.best["epoch"] == 1


def test_labels_and_images_that_do_not_fit_the_model():
    with pytest.raises(DataError, match="labels go from 2 to 9, the model has 5 classes"):
        fit(tiny_model(num_classes=5))
    with pytest.raises(UnsupportedModelError, match="has no classifier"):
        fit(tiny_model(num_classes=0))
    with pytest.raises(InputSizeError, match="image size 32x32 does not fit a model made for 48x48"):
        fit(tiny_model(img_size=48))


@pytest.mark.parametrize("options", [{"sched": "wsd", "warmup_epochs": 1}, {"opt": "fusedadam"}, {"opt": "adahessian"}])
def test_what_timm_cannot_set_up(tiny_vit, options):
    with pytest.raises(ConfigError, match=r"timm cannot train with opt=\w+, sched=\w+, epochs=1"):
        train(tiny_vit, Images(), epochs=1, progress=False, **options)


def test_models_of_another_run_are_not_replaced(tiny_vit, tmp_path):
    leanvit.save(tiny_vit, tmp_path / "best")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="holds a model in best/ and no checkpoint; give another folder"):
            fit(tiny_vit, output=tmp_path, resume=resume)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    for name in (".best.1a2b3c4d.draft", ".last.1a2b3c4d.old", ".checkpoint-3.tmp", ".mine"):
        (tmp_path / name).mkdir()
    RunFolder(tmp_path, {}, resume=True).start()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "args.yaml"]


def test_data_that_is_not_labelled(tiny_vit):
    with pytest.raises(DataError, match=r"a pair \(images, labels\) of tensors, not a tensor of shape"):
        fit(tiny_vit, Unlabelled())


def test_a_run_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run", {}, resume=False).path == tmp_path / "run"
