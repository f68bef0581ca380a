"""The fast paths against their references, on random shapes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanvit.methods.base import grid_positions
from leanvit.ops.aggregate import aggregation_weights, cell_centres, partition
from leanvit.ops.attention import attention
from leanvit.ops.linear import blocked, blocks_of, column_major, linear, linear_reference
from leanvit.ops.static import (
    coarse_scale,
    coarse_static_attention,
    interpolation,
    pool_static,
    resize_static,
    static_attention,
    static_attention_reference,
)

shapes = pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(1, 1, 1, 4), (1, 197, 3, 24), (5, 17, 2, 8), (3, 50, 6, 8), (2, 33, 1, 5)]
)
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])


@shapes
@dtypes
@torch.no_grad()
def test_static_attention(batch, tokens, heads, width, dtype, tolerance):
    static = torch.randn(heads, tokens, tokens).softmax(-1)
    v = torch.randn(batch, tokens, heads * width)
    expected = static_attention_reference(static.double(), v.double())
    got = static_attention(static.to(dtype), v.to(dtype))
    assert got.dtype == dtype and got.is_contiguous()
    assert (got - expected).abs().max() < tolerance


def test_static_attention_gradients():
    static = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(static_attention, (static, v))


@shapes
@dtypes
@torch.no_grad()
def test_attention(batch, tokens, heads, width, dtype, tolerance):
    q, k, v = torch.randn(3, 4 * batch, heads, tokens, width).to(dtype)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (attention(q, k, v) - expected).abs().max() < tolerance


@pytest.mark.parametrize("ending", ["", "none", "tanh", "residual"])
@pytest.mark.parametrize("shape", [(1, 7, 16), (3, 50, 33), (4, 12)])
@dtypes
def test_linear(ending, shape, dtype, tolerance):
    x, weight, bias = torch.randn(shape), torch.randn(24, shape[-1]) / 4, torch.randn(24)
    residual = torch.randn(*shape[:-1], 24)
    then = {"residual": residual} if ending == "residual" else {"gelu": ending}
    expected = linear_reference(x.double(), weight.double(), bias.double(), **_cast(then, torch.float64))
    with torch.no_grad():
        for bias_or_none in (bias, None):
            want = expected if bias_or_none is not None else linear_reference(x, weight, None, **then)
            cast = None if bias_or_none is None else bias_or_none.to(dtype)
            got = linear(x.to(dtype), column_major(weight).to(dtype), cast, **_cast(then, dtype))
            assert (got - want).abs().max() < 3 * tolerance
    trained = linear(x.requires_grad_(), weight, bias, **then)  # with gradients, the reference path
    assert trained.requires_grad and (trained - expected).abs().max() < 1e-5


def _cast(then, dtype):
    return {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in then.items()}


@pytest.mark.parametrize("new", [(14, 14), (16, 16), (7, 20), (3, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resized_static_attention_stays_a_distribution(new, prefix):
    old = (14, 14)
    static = torch.randn(2, prefix + 196, prefix + 196).softmax(-1)
    out = resize_static(static, prefix, old, new)
    count = prefix + new[0] * new[1]
    assert out.shape == (2, count, count) and (out >= 0).all()
    assert torch.allclose(out.sum(-1), torch.ones(2, count))
    if new == old:
        assert torch.allclose(out, static, atol=1e-6)


def test_resized_static_attention_keeps_its_places():
    """A patch that attends to itself and to the class token still does so, at another resolution."""
    static = torch.eye(17).unsqueeze(0) * 0.5
    static[:, :, 0] += 0.5
    out = resize_static(static, 1, (4, 4), (8, 8))
    assert torch.allclose(out[:, 1:, 0], torch.tensor(0.5), atol=1e-6)  # attention to the class token is kept
    assert (out[0, 1:, 1:].argmax(-1).unflatten(0, (8, 8)) - torch.arange(64).unflatten(0, (8, 8))).abs().max() <= 9


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (3, 5), (1, 9)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_partition_is_even_and_compact(grid, share):
    positions = grid_positions(grid)
    cells = max(1, int(len(positions) * share))
    labels = partition(positions, cells)
    sizes = torch.bincount(labels, minlength=cells)
    assert sizes.min() >= 1 and len(sizes) == cells and sizes.max() <= -(-len(positions) // cells) + 1
    centres = cell_centres(positions, labels, cells)
    radius = (positions - centres[labels]).norm(dim=1).max()
    assert radius <= 1.5 * sizes.max() ** 0.5 / max(grid) or min(grid) == 1


def test_partition_halves_a_grid_in_straight_lines():
    assert partition(grid_positions((2, 4)), 2).tolist() == [0, 0, 1, 1] * 2


def test_partition_of_a_grid_that_divides_is_square():
    positions = grid_positions((14, 14))
    for _ in range(2):  # 196 → 98 → 49: pairs of patches, then squares of four
        labels = partition(positions, len(positions) // 2)
        positions = cell_centres(positions, labels, len(positions) // 2)
    assert torch.allclose(positions, grid_positions((7, 7)))


def test_aggregation_weights_sum_to_one():
    weights = aggregation_weights(torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(9, 4))
    assert weights.shape == (2, 4, 9) and torch.allclose(weights.sum(-1), torch.ones(2, 4))


grids = pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (8, 8)), ((4, 3), (7, 9)), ((5, 5), (3, 4)), ((4, 4), (4, 4))]
)


@grids
@pytest.mark.parametrize("prefix", [0, 1, 5])
@torch.no_grad()
def test_static_attention_on_a_coarse_grid_is_the_resized_one(old, new, prefix):
    static = torch.randn(2, prefix + old[0] * old[1], prefix + old[0] * old[1]).softmax(-1)
    v = torch.randn(3, prefix + new[0] * new[1], 8)
    axes = [interpolation(*sides) for sides in zip(old, new, strict=True)]
    want = static_attention(resize_static(static, prefix, old, new), v)
    assert (coarse_static_attention(static, v, *axes) - want).abs().max() < 1e-5
    assert (coarse_static_attention(static, v, *axes, coarse_scale(static, *axes)) - want).abs().max() < 1e-5


def test_static_attention_on_a_coarse_grid_gradients():
    static = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 10, 4, dtype=torch.float64, requires_grad=True)
    axes = [interpolation(2, 3).double()] * 2
    assert torch.autograd.gradcheck(lambda static, v: coarse_static_attention(static, v, *axes), (static, v))


@grids
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_attention_pooled_to_a_coarse_grid_stays_a_distribution(old, new, prefix):
    fine = torch.randn(2, prefix + new[0] * new[1], prefix + new[0] * new[1]).softmax(-1)
    coarse = pool_static(fine, prefix, *(interpolation(*sides) for sides in zip(old, new, strict=True)))
    assert coarse.shape[1:] == (prefix + old[0] * old[1],) * 2
    assert torch.allclose(coarse.sum(-1), torch.ones(coarse.shape[:2]), atol=1e-5)
    if old == new:
        assert torch.allclose(coarse, fine, atol=1e-6)


def test_attention_pooled_to_a_coarse_grid_keeps_its_places():
    fine = torch.eye(65).unsqueeze(0)
    fine[0, 1:, 0] = 1
    coarse = pool_static(fine / fine.sum(-1, keepdim=True), 1, interpolation(4, 8), interpolation(4, 8))
    assert torch.allclose(coarse[0, 1:, 0], torch.tensor(0.5), atol=1e-6)
    assert (coarse[0, 1:, 1:].argmax(-1) == torch.arange(16)).all()


@torch.no_grad()
def test_a_blocked_weight_follows_its_parameter():
    x, weight = torch.randn(5, 33), nn.Parameter(torch.randn(24, 33))
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: weight.mul_(2),
        lambda: weight.copy_(torch.randn(24, 33)),
        lambda: setattr(weight, "data", torch.randn(24, 33)),
        lambda: setattr(weight, "data", column_major(torch.randn(24, 33))),
        lambda: setattr(weight, "data", weight.data[:7]),
    ]
    for change in changes:
        change()
        for _ in range(2):  # made, then kept
            got = torch.ops.mkldnn._linear_pointwise(x, blocked(weight), None, "none", [], "")
            assert torch.allclose(got, x @ weight.T, atol=1e-5)
    kept = blocked(weight)
    assert blocked(weight) is kept and blocks_of([weight]) == [kept]
    assert blocks_of([copy.deepcopy(weight)]) == []
    assert blocked(weight[:3]).layout is torch.strided, "of what is no parameter nothing is kept"


def test_blocks_go_with_their_parameter():
    weight = nn.Parameter(torch.randn(24, 33))
    kept = weakref.ref(blocked(weight))
    assert kept() is not None
    del weight
    assert kept() is None


def test_no_blocks_are_kept_of_fake_weights():
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(24, 33))
        assert blocked(weight) is weight
