"""Sparsifiner: its predictor, its phases, what it costs, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

import leanvit
from leanvit.methods.sparsifiner import (
    Sparsifiner,
    local_pooling,
    low_rank,
    nonnegative_factor,
    resize_predictor,
    sparse_basis,
)  # fmt: skip
from leanvit.ops.sparse import TOP
from leanvit.report.tables import Table

from .contract import photos, small_vit

KINDS = {"keep": 0.3, "rho": 4}


def sparse_vit(**changes):
    vit = small_vit()
    return vit, photos(vit, 8), leanvit.slim(vit, Sparsifiner(**(KINDS | changes)))


def test_projections_keep_the_most_of_the_products():
    torch.manual_seed(0)
    q, k = torch.randn(2, 500, 12) @ torch.randn(2, 12, 12), torch.randn(2, 500, 12) @ torch.randn(2, 12, 12)
    k = k - k.mean(1, True)
    moments = [(side.mT @ side).double() for side in (q, k)]

    def error(rank):
        reduce_q, reduce_k = low_rank(*moments, rank)
        return (q.double() @ (torch.eye(12) - reduce_q @ reduce_k.mT) @ k.double().mT).square().mean()

    errors = [float(error(rank)) for rank in (1, 3, 6, 9, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    cut = torch.eye(12, 6).double()
    assert errors[2] < (q.double() @ (torch.eye(12) - cut @ cut.mT) @ k.double().mT).square().mean()


def test_basis_is_fitted_and_never_negative():
    torch.manual_seed(0)
    c, basis = torch.rand(1, 200, 5).softmax(-1), torch.rand(1, 5, 9)
    found = nonnegative_factor(c.mT @ c, c.mT @ (c @ basis))
    assert (found >= 0).all()
    flat = (c @ basis).mean(1, True)
    assert (c @ (found - basis)).square().mean() < 0.5 * (c @ basis - flat).square().mean()


def test_small_entries_are_dropped_but_rows_fill_the_budget():
    basis = torch.rand(3, 5, 196).square() * 0.04
    for keep in (0.1, 0.5, 1.0):
        sparse = sparse_basis(basis, keep)
        assert ((sparse > 0).sum(-1) >= math.ceil(keep / 4 * 196)).all()
        assert (sparse[basis >= 0.02] == basis[basis >= 0.02]).all()
    assert (sparse_basis(basis, 0.01) > 0).sum() < (basis > 0).sum()
    assert torch.equal(sparse_basis(-basis, 0.3), sparse_basis(basis, 0.3))


def test_resized_predictor_keeps_its_sums():
    pooling, basis = local_pooling((4, 4), Sparsifiner(rho=4))
    new_pooling, new_basis = resize_predictor(pooling[None], basis[None], (4, 4), (8, 6))
    assert new_pooling.shape == (1, 48, 4) and new_basis.shape == (1, 4, 48)
    assert torch.allclose(new_pooling.sum(1), torch.ones(1, 4), atol=1e-4)
    assert torch.allclose(new_basis.sum(-1), basis.sum(-1), atol=0.05)


def test_the_warm_start_finds_what_is_attended_to():
    vit, images, lean = sparse_vit()

    @torch.no_grad()
    def share():
        with leanvit.record("connections") as found:
            lean(images)
        x = vit.pos_drop(vit._pos_embed(vit.patch_embed(images)))
        attention = lean.blocks[0].attn
        q, k, _ = attention.qkv(vit.blocks[0].norm1(x)).view(8, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        dense = (q @ k.mT * 16**-0.5).softmax(-1)
        return float((dense * found["connections"][0].value)[:, :, 1:].sum(-1).mean())

    before = share()
    leanvit.warm_start(lean, vit, images, steps=0, batch_size=4, progress=False)
    assert share() > before + 0.02


def test_every_key_is_the_dense_model():
    vit, images, lean = sparse_vit(keep=1.0)
    with torch.no_grad():
        assert (lean(images) - vit(images)).abs().max() < 1e-4
        assert (leanvit.deploy(lean)(images) - vit(images)).abs().max() < 1e-4


def test_predictor_first_then_all_of_it():
    vit, images, lean = sparse_vit(reconstruction=0.2)
    method = lean.lean.methods[0]
    method.set_progress(lean, 0.1)
    trained = {name for name, parameter in lean.named_parameters() if parameter.requires_grad}
    assert trained == lean.new_parameter_names()
    with leanvit.record() as found:
        assert torch.allclose(lean(images), vit(images), atol=1e-4)  # dense so far
    assert not found["connections"] and 0 < method.losses(found)["reconstruction"] < 2
    with pytest.raises(leanvit.DeployError, match="predictor alone"):
        leanvit.deploy(lean)
    method.set_progress(lean, 0.2)
    assert all(parameter.requires_grad for parameter in lean.parameters())
    with leanvit.record() as found:
        loss = lean(images).square().sum()
    assert len(found["connections"]) == 4 and method.losses(found) == {}
    loss.backward()
    assert lean.blocks[1].attn.basis.grad is None and lean.blocks[1].attn.qkv.weight.grad is not None


def test_what_a_user_froze_stays_frozen():
    _, _, lean = sparse_vit(reconstruction=0.2)
    lean.head.requires_grad_(False)
    for progress in (0.1, 0.5):
        lean.lean.methods[0].set_progress(lean, progress)
    assert not lean.head.weight.requires_grad and lean.blocks[0].mlp.fc1.weight.requires_grad


def test_what_an_interrupted_run_stopped_is_trained_by_the_next():
    class Interrupted(Dataset):
        left = 20

        def __len__(self):
            return 32

        def __getitem__(self, index):
            Interrupted.left -= 1
            if not Interrupted.left:
                raise KeyboardInterrupt
            return torch.randn(3, 32, 32), index % 10

    vit, _, lean = sparse_vit(reconstruction=0.5)
    options = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 0, "workers": 0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        leanvit.distill(lean, vit, Interrupted(), **options)
    assert not lean.blocks[0].mlp.fc1.weight.requires_grad
    copied, before = copy.deepcopy(lean), lean.blocks[0].mlp.fc1.weight.clone()
    copied.lean.methods[0].set_progress(copied, 1.0)
    assert all(parameter.requires_grad for parameter in copied.parameters())
    leanvit.distill(lean, vit, Interrupted(), **options)
    assert not torch.equal(lean.blocks[0].mlp.fc1.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [2, 3])
@torch.no_grad()
def test_the_predictor_computes_in_fp32_in_a_model_of_any_type(dtype, heads):
    vit = small_vit(num_heads=heads)
    lean, images = leanvit.slim(vit, Sparsifiner(**KINDS)).to(dtype), photos(vit)
    assert (lean(images.to(dtype)) - leanvit.deploy(lean)(images.to(dtype))).abs().max() < 0.1


@torch.no_grad()
def test_a_resized_model_is_saved_and_warm_started(tmp_path):
    lean = leanvit.slim(small_vit(img_size=64), leanvit.Sparsifiner(keep=0.5, rho=4))
    lean.set_input_size(96)
    images = torch.randn(4, 3, 96, 96)
    for name, model in (("lean", lean), ("deployed", leanvit.deploy(lean))):
        leanvit.save(model, tmp_path / name)
        assert torch.equal(leanvit.load(tmp_path / name)(images), model(images))
    assert leanvit.warm_start(lean, small_vit(img_size=96), images, steps=1, progress=False)
    lean.set_input_size(64)
    assert lean.lean.methods[0].rho == 4


@torch.no_grad()
def test_connections_are_per_image_head_and_layer():
    _, images, lean = sparse_vit(keep=0.3)
    for model in (lean, leanvit.deploy(lean)):
        with leanvit.record("connections") as found:
            model(images)
        masks = torch.stack([record.value for record in found["connections"]])
        assert masks.shape == (4, 8, 3, 17, 17) and masks.dtype == torch.bool
        assert (masks[..., 1:, :].sum(-1) == math.ceil(0.3 * 17)).all()
        assert masks[..., 0, :].all() and masks[..., 0].all()
        assert not torch.equal(masks[:, 0], masks[:, 1]) and not torch.equal(masks[:, :, 0], masks[:, :, 1])


@pytest.mark.parametrize("threshold", [None, 0.15])
@torch.no_grad()
def test_macs_are_those_of_the_formula(threshold):
    vit, images, lean = sparse_vit(keep=0.4, threshold=threshold)
    leanvit.warm_start(lean, vit, images, steps=2, batch_size=4, progress=False)
    fast = leanvit.deploy(lean)
    with leanvit.record("connections") as found:
        fast(images)
    macs, width, heads, patches = 0.0, 16, 3, 16
    for record in found["connections"]:
        basis = fast.blocks[record.layer].attn.basis
        rows = basis.shape[1]
        predictor = patches * 48 * width + patches * rows * 48  # both projections; E and c
        predictor += heads * patches * min(TOP, rows) * int((basis != 0).sum()) / (heads * rows)
        macs += predictor + 2 * int(record.value.sum()) / len(images) * width
    assert leanvit.count(fast, images=images).by_kind["attention"].macs == pytest.approx(macs, rel=1e-6)


@torch.no_grad()
def test_bf16_keeps_the_predictor_in_fp32():
    _, images, lean = sparse_vit()
    fast = leanvit.deploy(lean).to(torch.bfloat16)
    attention = fast.blocks[0].attn
    assert {table.dtype for table in attention.predictor()} == {torch.float32}
    assert attention.qkv.weight.dtype == torch.bfloat16
    assert fast(images.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_compiled_calls_the_operation():
    _, images, lean = sparse_vit()
    fast = leanvit.deploy(lean)
    program = torch.export.export(fast, (images,))
    assert not any("leanvit" in str(node.target) for node in program.graph.nodes)  # other engines can run it
    assert "one operation" in repr(fast.blocks)


def test_with_a_threshold_cost_depends_on_the_image():
    _, images, lean = sparse_vit(keep=0.9, threshold=0.06)
    fast = leanvit.deploy(lean)
    labelled = TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    macs = leanvit.evaluate(fast, labelled, batch_size=4, progress=False).macs
    assert macs.tolist() == [leanvit.count(fast, images=image[None]).macs for image in images]
    assert len(set(macs.tolist())) > 1 and lean.lean.data_dependent
    assert leanvit.evaluate(leanvit.deploy(sparse_vit()[2]), labelled, progress=False).macs is None


def test_another_grid_is_refused_until_resized():
    vit = small_vit(dynamic_img_size=True)
    lean = leanvit.slim(vit, Sparsifiner(**KINDS))
    with pytest.raises(leanvit.InputSizeError, match=r"set_input_size\(\), which interpolates E and U"):
        lean(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, r"keep=0 is not in \(0, 1\]"),
        ({"keep": -0.5}, r"keep=-0.5 is not in \(0, 1\]"),
        ({"keep": 1.01}, r"keep=1.01 is not in \(0, 1\]"),
        ({"keep": "many"}, r"keep='many' is not in \(0, 1\]"),
        ({"keep": math.nan}, r"keep=nan is not in \(0, 1\]"),
        ({"rho": 0.5}, "rho=0.5 is not a number from 1 on"),
        ({"rho": math.inf}, "rho=inf is not a number from 1 on"),
        ({"layers": "auto"}, "layers='auto' is not 'all' or block indices"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (1, 1)}, "each given once"),
        ({"threshold": 0}, r"threshold=0 is not in \(0, 1\)"),
        ({"threshold": 1.5}, r"threshold=1.5 is not in \(0, 1\)"),
        ({"reconstruction": 1}, r"reconstruction=1 is not in \[0, 1\)"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(leanvit.ConfigError, match=message):
        Sparsifiner(**changes)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((Sparsifiner(keep=0.05),), "keep=0.05 of 17 tokens is 1 of them, and prefix tokens take 1: .* above 0.0588"),
        ((Sparsifiner(rho=17),), "rho=17 leaves no basis for 16 patches; use rho up to 16"),
        ((Sparsifiner(layers=(3, 4)),), "block 4 does not exist; the model has blocks 0 to 3"),
        ((leanvit.GLAD(at=2), Sparsifiner()), "sparsifiner: block 2 needs to know the place of each token, but glad"),
        ((leanvit.TokenMerging(r=2), Sparsifiner()), "sparsifiner: block 1 needs to know the place of each token, but"),
    ],
)
def test_what_does_not_fit_the_model(methods, message):
    with pytest.raises(leanvit.MethodError, match=message):
        leanvit.slim(small_vit(), *methods)


def test_a_grid_too_small_for_the_basis_is_refused():
    _, _, lean = sparse_vit(rho=1)
    with pytest.raises(leanvit.MethodError, match="9 patches are fewer than the 16 patterns of the basis"):
        lean.set_input_size((24, 24))


def test_evaluation_tells_the_density_by_layer_and_head():
    _, images, lean = sparse_vit(layers=(1, 3))
    data = torch.utils.data.TensorDataset(images, torch.zeros(8, dtype=torch.long))
    for model in (lean, leanvit.deploy(lean)):
        result = leanvit.evaluate(model, data, batch_size=3, progress=False)
        assert result.density.keys() == {1, 3}
        expected = torch.full((3,), (17 + 16 * math.ceil(0.3 * 17)) / 17**2)
        assert all(torch.allclose(heads, expected) for heads in result.density.values())
        row = result.row()
        assert row["density_by_layer"].keys() == {1, 3} and row["density"] == pytest.approx(float(expected[0]))
        assert "density_by_layer" not in str(Table([row]))


def test_masked_training_is_attention_to_the_chosen_keys():
    _, images, lean = sparse_vit()
    with torch.no_grad(), leanvit.record("connections") as found:
        lean(images)
    attention = lean.blocks[0].attn
    x = lean.blocks[0].norm1(lean._pos_embed(lean.patch_embed(images)))
    q, k, v = attention.qkv(x).view(8, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=found["connections"][0].value)
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    got = attention.attend(x, lean.blocks.tokens(x)).x
    assert torch.allclose(got, expected, atol=1e-5)
