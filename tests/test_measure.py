"""Counting, timing and accuracy: figures that are worked out by hand, and rows that agree with each other."""

from __future__ import annotations

import copy
import csv
import json
import time
import warnings
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import leanvit
from leanvit import errors
from leanvit.bench import bench, peak_memory, realised_share, take_turns
from leanvit.count import count, deployed_form, evaluating
from leanvit.data import open_data
from leanvit.measure import compare, environment, evaluate
from leanvit.report.tables import COLUMNS, Table, read_csv


def vit(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 10,
    }
    return timm.create_model("vit_tiny_patch16_224", **{**options, **changes}).eval()


def dense_macs(*, img_size=32, patch_size=8, embed_dim=48, depth=4, num_classes=10, prefix=1, channels=3) -> int:
    """4·N·C² + 2·N²·C + 8·N·C² a block, with patch embedding and head."""
    patches, width = (img_size // patch_size) ** 2, embed_dim
    tokens = patches + prefix
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    return patches * channels * patch_size**2 * width + depth * block + width * num_classes


class Fixed(nn.Module):
    """A classifier whose logits are its input's first pixels."""

    num_classes = 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.flatten(1)[:, :6] * self.weight


def labelled(scores: list[list[float]], labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.tensor(scores).view(len(scores), 1, 2, 3), torch.tensor(labels))


# ---- counting


def test_deit_tiny_counts_1_25_gmacs():
    cost = count(timm.create_model("deit_tiny_patch16_224"))
    expected = dense_macs(img_size=224, patch_size=16, embed_dim=192, depth=12, num_classes=1000)
    assert cost.macs == pytest.approx(expected, rel=1e-3)
    assert cost.macs == pytest.approx(1.25e9, rel=5e-3)
    assert cost.macts == pytest.approx(5.97e6, rel=1e-3)  # timm's results-imagenet.csv: 5.97
    assert cost.params == 5_717_416


@pytest.mark.parametrize("seed", range(5))
def test_count_equals_the_formula_at_random_shapes(seed):
    random = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=random))]

    patch_size = pick(4, 8, 16)
    shape = {
        "img_size": patch_size * pick(2, 3, 5),
        "patch_size": patch_size,
        "embed_dim": pick(24, 48, 96),
        "depth": pick(1, 2, 3),
        "num_classes": pick(3, 10),
    }
    assert count(vit(**shape), batch=pick(1, 3)).macs == dense_macs(**shape)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_count_is_the_same_for_every_attention_kernel(tiny_vit, fused, dtype):
    for block in tiny_vit.blocks:
        block.attn.fused_attn = fused
    cost = count(tiny_vit.to(dtype))
    assert cost.macs == dense_macs()
    assert cost.by_kind["attention"].macs == 4 * 2 * 17**2 * 48
    assert cost.macts == count(vit()).macts


def test_count_is_the_same_before_and_after_weights_are_kept_in_blocks(tiny_vit):
    fast = leanvit.deploy(leanvit.slim(tiny_vit)).bfloat16()
    first = count(fast)
    assert first.macs == dense_macs() and count(fast) == first


def test_layers_and_kinds_add_up(tiny_vit):
    cost = count(tiny_vit)
    assert list(cost.by_layer) == [
        *("(model)", "patch_embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head")
    ]
    for parts in (cost.by_layer.values(), cost.by_kind.values()):
        assert sum(part.macs for part in parts) == pytest.approx(cost.macs)
        assert sum(part.params for part in parts) == cost.params == sum(p.numel() for p in tiny_vit.parameters())
    assert cost.by_layer["(model)"].params == tiny_vit.cls_token.numel() + tiny_vit.pos_embed.numel()
    assert cost.by_kind["convolution"].macs == cost.by_layer["patch_embed"].macs
    assert sum(row["gmacs"] for row in cost.rows()) == pytest.approx(cost.macs / 1e9)


def test_count_per_image_does_not_depend_on_the_batch(tiny_vit):
    images = torch.randn(5, 3, 32, 32)
    assert count(tiny_vit, images=images).macs == count(tiny_vit, batch=3).macs == count(tiny_vit).macs


def test_products_that_torch_does_not_count(tiny_vit):
    class Head(nn.Module):
        def forward(self, x):  # (1, 48): 6x48 weights by one vector, then a batch of products summed up
            vector = self.weight @ x[0]
            return torch.addbmm(torch.zeros(6, 1), self.weight[None], x[:, :, None]) + vector[:, None]

    tiny_vit.head = Head()
    tiny_vit.head.weight = nn.Parameter(torch.randn(6, 48))
    assert count(tiny_vit).macs == dense_macs(num_classes=0) + 2 * 6 * 48


def test_operations_without_a_formula_are_refused(tiny_vit):
    @torch.library.custom_op("leanvit_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Twice(nn.Module):
        def forward(self, x):
            return twice(x)

    tiny_vit.norm = Twice()
    with pytest.raises(errors.UnsupportedModelError, match=r"no formula counts leanvit_test\.twice"):
        count(tiny_vit)


def test_count_leaves_the_model_as_it_was(tiny_vit):
    tiny_vit.train()
    tiny_vit.norm.eval()
    count(tiny_vit)
    assert tiny_vit.training
    assert not tiny_vit.norm.training
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())


def test_evaluating_restores_after_an_error(tiny_vit):
    tiny_vit.train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(tiny_vit):
        assert not tiny_vit.training
        raise RuntimeError("stop")
    assert all(module.training for module in tiny_vit.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"img_size": 48}, errors.InputSizeError, "48x48 does not fit a model made for 32x32"),
        ({"images": torch.randn(1, 3, 32, 40)}, errors.InputSizeError, "32x40 does not fit"),
        ({"batch": 0}, errors.ConfigError, "batch is 0"),
    ],
)
def test_count_refuses(tiny_vit, arguments, error, message):
    with pytest.raises(error, match=message):
        count(tiny_vit, **arguments)


def test_count_at_another_size_where_the_model_takes_it():
    model = vit(dynamic_img_size=True)
    assert count(model, 48).macs == dense_macs(img_size=48)
    with pytest.raises(errors.InputSizeError, match="50x50 is no multiple of the patch size 8x8"):
        count(model, 50)


# ---- lean models


@pytest.fixture
def lean(tiny_vit):
    methods = pytest.importorskip("leanvit.methods")
    model = pytest.importorskip("leanvit.model")
    return model.slim(tiny_vit, *methods.parse("glad:at=2"))


def test_a_lean_model_is_deployed_before_it_is_counted_and_timed(tiny_vit, lean):
    fast = deployed_form(lean)
    assert fast.lean.deployed
    assert not lean.lean.deployed
    assert count(lean).by_layer == count(fast).by_layer
    assert count(lean).macs < dense_macs()
    rows = bench((tiny_vit, lean), batch_sizes=(2,), precisions=("fp32",), threads=1, iterations=2, progress=False)
    assert rows[1]["method"] == str(lean.lean)
    assert rows[1]["infer_gmacs"] < rows[0]["infer_gmacs"]
    assert rows[1]["realised_share"] is not None


# ---- timing


def test_bench_rows_agree_with_each_other(tiny_vit):
    small = vit(depth=2)
    rows = bench(
        {"dense": tiny_vit, "small": small},
        batch_sizes=(1, 4),
        precisions=("fp32", "bf16"),
        threads=1,
        iterations=3,
        warmup=1,
        progress=False,
    )
    assert [(row["precision"], row["infer_batch_size"], row["model"]) for row in rows] == [
        (precision, size, name) for precision in ("fp32", "bf16") for size in (1, 4) for name in ("dense", "small")
    ]
    for dense, lean in zip(rows[::2], rows[1::2], strict=True):
        assert dense["speedup"] == 1
        assert dense["realised_share"] is None
        assert lean["speedup"] == pytest.approx(lean["infer_samples_per_sec"] / dense["infer_samples_per_sec"])
        assert lean["realised_share"] == pytest.approx(
            (1 - 1 / lean["speedup"]) / (1 - lean["infer_gmacs"] / dense["infer_gmacs"])
        )
        assert lean["peak_memory_mb"] < dense["peak_memory_mb"]
        for row in (dense, lean):
            assert row["latency_p50"] <= row["latency_p90"] <= row["latency_p99"]
            assert row["infer_step_time"] == row["latency_p50"]
            assert row["infer_samples_per_sec"] * row["infer_step_time"] == pytest.approx(1e3 * row["infer_batch_size"])
            assert row["iterations"] == 3
            assert set(row) <= set(COLUMNS)
    assert next(tiny_vit.parameters()).dtype == torch.float32  # what was given stays as it was


def test_bench_on_real_images(tiny_vit):
    images = torch.randn(3, 3, 32, 32)  # fewer than a batch: they are used again
    rows = bench((tiny_vit, vit(depth=1)), images=images, batch_sizes=(1, 8), precisions=("fp32",), threads=1,
                 iterations=1, progress=False)  # fmt: skip
    assert [row["infer_batch_size"] for row in rows] == [1, 1, 8, 8]
    assert {row["infer_img_size"] for row in rows} == {32}


def test_bench_says_when_random_images_tell_little(tiny_vit):
    adaptive = leanvit.slim(tiny_vit, leanvit.AdaViT())
    once = {"batch_sizes": (1,), "precisions": ("fp32",), "threads": 1, "iterations": 1, "progress": False}
    with pytest.warns(UserWarning, match="lean: what it costs depends on the image.*give images"):
        bench((tiny_vit, adaptive), **once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench((tiny_vit, adaptive), images=torch.randn(1, 3, 32, 32), **once)
        bench((tiny_vit, leanvit.slim(tiny_vit)), **once)


def test_bench_restores_the_number_of_threads(tiny_vit):
    before = torch.get_num_threads()
    bench(
        {"dense": tiny_vit},
        batch_sizes=(1,),
        precisions=("fp32",),
        threads=before + 1,
        iterations=1,
        progress=False,
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precisions": ("int3",)}, errors.ConfigError, "precision is 'int3'; torch computes in fp32, bf16, fp16"),
        ({"precisions": ()}, errors.ConfigError, "no precision"),
        ({"batch_sizes": (4, 0)}, errors.ConfigError, "batch size is 0; it must be at least 1"),
        ({"batch_sizes": ()}, errors.ConfigError, "batch size is 0"),
        ({"threads": 0}, errors.ConfigError, "threads is 0"),
        ({"iterations": 0}, errors.ConfigError, "iterations is 0"),
        ({"warmup": -1}, errors.ConfigError, "warmup is -1"),
        ({"img_size": 33}, errors.InputSizeError, "33x33 does not fit"),
        (
            {"img_size": 32, "images": torch.randn(1, 3, 32, 32)},
            errors.ConfigError,
            "both img_size and images",
        ),
        ({"images": torch.randn(1, 3, 16, 16)}, errors.InputSizeError, "16x16 does not fit"),
    ],
)
def test_bench_refuses(tiny_vit, arguments, error, message):
    with pytest.raises(error, match=message):
        bench({"dense": tiny_vit}, progress=False, **arguments)


@pytest.mark.parametrize(("models", "message"), [({}, "no model to time"), ([1, 2, 3], "3 models without names")])
def test_bench_refuses_models(models, message):
    with pytest.raises(errors.ConfigError, match=message):
        bench(models)


def test_take_turns_interleaves_and_rotates():
    order: list[str] = []
    times = take_turns([lambda name=name: order.append(name) for name in "abc"], iterations=3, warmup=1, settle=0)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(each) for each in times] == [3, 3, 3]


@pytest.mark.parametrize(("settle", "order", "seconds"), [(0.05, "ab" + "aabb" + "bbaa", 0.01), (0.02, "ababba", 0.03)])
def test_the_second_of_two_calls_counts_where_one_is_short(settle, order, seconds, monkeypatch):
    now, calls = 0.0, ""

    def run(name: str, alone: float) -> None:
        nonlocal now, calls
        now += alone if calls.endswith(name) else 3 * alone
        calls += name

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    runs = [partial(run, "a", 0.01), partial(run, "b", 1.0)]
    times = take_turns(runs, iterations=2, warmup=1, settle=settle)
    assert calls == order
    assert times[0] == pytest.approx([seconds] * 2) and times[1][0] == pytest.approx(100 * seconds)


def test_peak_memory_is_exact_and_repeatable():
    def run():
        first = torch.empty(1000, 1000)  # 4 MB
        second = torch.empty(500, 1000)  # 2 MB more at the same time
        del first, second
        torch.empty(250, 1000)  # 1 MB, after the others are gone

    assert [peak_memory(run) for _ in range(3)] == [6_000_000] * 3


def test_realised_share():
    assert realised_share(2.0, 0.5) == 1
    assert realised_share(1.0, 0.5) == 0
    assert realised_share(0.5, 0.5) == -2
    assert realised_share(1.1, 1.0) is None


# ---- accuracy


def test_evaluate_against_a_count_by_hand():
    scores = [[6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [0, 9, 0, 0, 0, 0]]
    result = evaluate(Fixed(), labelled(scores, [0, 4, 5, 1]), batch_size=3, progress=False)
    assert (result.top1, result.top5, result.count) == (50, 75, 4)
    assert (result.top1_err, result.top5_err) == (50, 25)
    assert result.agreement is None
    assert result.damaged == ()
    assert result.predictions.tolist() == [0, 5, 0, 1]
    assert result.labels.tolist() == [0, 4, 5, 1]
    assert "agreement" not in result.row()


def test_evaluate_agreement_with_a_teacher(tiny_vit):
    images = TensorDataset(torch.randn(9, 3, 32, 32), torch.arange(9))
    other = vit(depth=1)
    expected = 100 * (tiny_vit(images.tensors[0]).argmax(1) == other(images.tensors[0]).argmax(1)).float().mean()
    result = evaluate(tiny_vit, images, teacher=other, batch_size=4, progress=False)
    assert result.agreement == pytest.approx(expected.item())
    assert evaluate(tiny_vit, images, teacher=tiny_vit, progress=False).agreement == 100


def test_evaluate_with_autocast_and_in_training_mode(tiny_vit):
    tiny_vit.train()
    images = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    result = evaluate(tiny_vit, images, amp="bf16", progress=False)
    assert result.count == 4
    assert tiny_vit.training


def test_evaluate_counts_damaged_images(tiny_vit):
    class Damaged(Dataset):
        damaged = ("broken.png",)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return None if index == 1 else (torch.zeros(3, 32, 32), 0)

    result = evaluate(tiny_vit, Damaged(), batch_size=1, progress=False)
    assert (result.count, result.damaged) == (2, ("broken.png",))


def test_evaluate_reads_a_path(tiny_vit):
    model = vit(in_chans=1)
    assert evaluate(model, "digits", batch_size=100, progress=False).count > 300


class Headless(Fixed):
    num_classes = 0


class Maps(Fixed):
    def forward(self, images):
        return images


@pytest.mark.parametrize(
    ("model", "labels", "arguments", "error", "message"),
    [
        (Headless(), [0], {}, errors.UnsupportedModelError, "Headless has no classifier"),
        (
            Maps(),
            [0],
            {},
            errors.UnsupportedModelError,
            r"no classifier: its output has shape \(1, 1, 2, 3\)",
        ),
        (Fixed(), [6], {}, errors.DataError, "labels go from 6 to 6, the model has 6 classes"),
        (Fixed(), [-1], {}, errors.DataError, "labels go from -1"),
        (Fixed(), [0], {"amp": "int8"}, errors.ConfigError, "amp is 'int8'"),
        (Fixed(), [0], {"batch_size": 0}, errors.ConfigError, "batch size is 0"),
    ],
)
def test_evaluate_refuses(model, labels, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(model, labelled([[1, 2, 3, 4, 5, 6]], labels), progress=False, **arguments)


def test_evaluate_refuses_an_empty_data_set():
    with pytest.raises(errors.DataError, match="no images to evaluate on"):
        evaluate(Fixed(), TensorDataset(torch.empty(0, 1, 2, 3), torch.empty(0, dtype=torch.long)), progress=False)


# ---- the table


def test_compare_puts_it_all_in_one_table(tiny_vit, tmp_path):
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    table = compare(tiny_vit, {"small": vit(depth=2)}, data, batch_sizes=(1,), threads=1, iterations=2, progress=False)
    dense, small = table.rows
    assert small["top1_diff"] == small["top1"] - dense["top1"]
    assert small["teacher"] == "dense"
    assert "agreement" in small
    assert "top1_diff" not in dense
    printed = str(table)
    for part in ("8 images", "top-1 %", "images/s", "peak MB", "GMACs", "small", "threads 1"):
        assert part in printed

    table.to_csv(tmp_path / "deep" / "results.csv")
    with (tmp_path / "deep" / "results.csv").open() as file:
        header = next(csv.reader(file))
    assert header == [name for name in COLUMNS if name in header]
    back = read_csv(tmp_path / "deep" / "results.csv")
    assert back[1]["infer_samples_per_sec"] == pytest.approx(small["infer_samples_per_sec"], rel=1e-5)
    assert back[0]["agreement"] is None
    assert back[0]["model"] == "dense"

    table.to_json(tmp_path / "results.json", settings={"threads": 1}, environment=environment())
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == table.rows
    assert written["settings"] == {"threads": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "results.json"]


def test_compare_needs_something_to_compare_with(tiny_vit):
    for lean in ({}, {"dense": tiny_vit}, tiny_vit):
        with pytest.raises(errors.ConfigError, match="nothing to compare with"):
            compare(tiny_vit, lean, TensorDataset(torch.zeros(1, 3, 32, 32), torch.zeros(1)))


def test_compare_takes_accuracy_in_each_precision(tiny_vit):
    data = TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 10)
    options = {"batch_sizes": (1,), "precisions": ("fp32", "bf16"), "threads": 1, "iterations": 1, "progress": False}
    rows = compare(tiny_vit, {"small": vit(depth=2)}, data, **options).rows
    for row in rows:
        model = {"dense": tiny_vit, "small": vit(depth=2)}[row["model"]]
        cast = copy.deepcopy(model).bfloat16() if row["precision"] == "bf16" else model
        assert row["top1"] == evaluate(cast, data, progress=False).top1
    assert rows[3]["top1_diff"] == rows[3]["top1"] - rows[2]["top1"]
    with pytest.raises(errors.ConfigError, match="precision is 'fp8'"):
        compare(tiny_vit, vit(depth=2), data, precisions=("fp8",), progress=False)
    with pytest.raises(errors.ConfigError, match="this data is open already"):
        compare(tiny_vit, vit(depth=2), data, split="val")


def test_compare_opens_a_path_for_each_model(tmp_path):
    """A model with another normalisation gets its own images, and agrees with itself."""
    dense, other = vit(in_chans=1), vit(in_chans=1)
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.2,), "std": (0.9,)}
    options = {"batch_sizes": (1,), "threads": 1, "iterations": 1, "progress": False, "split": "val"}
    row = compare(dense, {"other": other}, "digits", **options).rows[1]
    assert row["top1"] == evaluate(other, open_data("digits", other), progress=False).top1
    with pytest.raises(errors.ConfigError, match="the teacher takes 32×32, the student 48×48"):
        compare(dense, vit(in_chans=1, img_size=48), "digits", progress=False)


def test_images_of_another_size_are_refused(tiny_vit):
    data = TensorDataset(torch.randn(2, 3, 48, 48), torch.arange(2))
    with pytest.raises(errors.InputSizeError, match="image size 48x48 does not fit a model made for 32x32"):
        evaluate(tiny_vit, data, progress=False)


def test_evaluate_says_what_data_it_takes(tiny_vit):
    with pytest.raises(errors.DataError, match="a path, a data set or a loader, not a Tensor"):
        evaluate(tiny_vit, torch.zeros(2, 3, 32, 32))


def test_evaluate_leaves_the_teacher_as_it_was(tiny_vit):
    teacher = vit().train()
    teacher.blocks[1].eval()
    before = [module.training for module in teacher.modules()]
    evaluate(tiny_vit, TensorDataset(torch.randn(2, 3, 32, 32), torch.arange(2)), teacher=teacher, progress=False)
    assert [module.training for module in teacher.modules()] == before


def test_a_table_of_layers_prints(tiny_vit):
    printed = str(Table(count(tiny_vit).rows(), title="by layer"))
    assert "patch_embed" in printed
    assert "share" in printed


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), ("", "is empty")])
def test_read_csv_refuses(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.ConfigError, match=message):
        read_csv(path)


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match=r"cannot write .*results\.csv: (Not a directory|File exists)"):
        Table([{"model": "dense"}]).to_csv(tmp_path / "file" / "results.csv")


def test_environment_names_what_figures_depend_on():
    found = environment()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["processor"]
    assert found["cores"] >= 1
    json.dumps(found)
