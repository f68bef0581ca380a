"""Linear-angular attention and the depthwise convolutions against their references."""

from __future__ import annotations

import pytest
import torch

from leanvit.ops import angular
from leanvit.ops.angular import angular_map, linear_angular, linear_angular_reference, unit
from leanvit.ops.depthwise import convolve, convolve_grid, convolve_reference, convolve_tokens

shapes = pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"),
    [(1, 1, 1, 4), (1, 3, 197, 24), (5, 2, 17, 8), (3, 6, 50, 8), (2, 1, 33, 5), (4, 3, 7, 16), (1, 3, 9, 64)],
)
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])


def drawn(batch, heads, tokens, width, dtype=torch.float64):
    """Queries, keys and values where a joint projection leaves them, and a gain."""
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), torch.linspace(0.5, 2, heads).to(dtype)


@shapes
@dtypes
@pytest.mark.parametrize("trained", [False, True])
def test_linear_angular(batch, heads, tokens, width, dtype, tolerance, trained):
    """The path of inference and the one that is differentiated, in the memory layout of a joint projection."""
    inputs = [tensor.to(dtype) for tensor in drawn(batch, heads, tokens, width)]
    expected = linear_angular_reference(*[tensor.double() for tensor in inputs])
    with torch.set_grad_enabled(trained):
        got = linear_angular(*[tensor.requires_grad_(trained) for tensor in inputs])
    assert got.dtype == dtype and got.shape == (batch, tokens, heads * width) and got.requires_grad == trained
    assert (got - expected).abs().max() < tolerance


@shapes
def test_linear_angular_with_what_is_beside_and_sizes(batch, heads, tokens, width):
    q, k, v, gain = drawn(batch, heads, tokens, width)
    beside, size = torch.randn_like(v), torch.randint(1, 5, (batch, tokens)).float()
    for extra in ({"beside": beside}, {"size": size}, {"beside": beside, "size": size}):
        expected = linear_angular_reference(q, k, v, gain, **extra)
        torch.testing.assert_close(linear_angular(q, k, v, gain, **extra), expected)


def test_a_key_that_stands_for_two_counts_as_two():
    q, k, v, gain = drawn(2, 3, 9, 4)
    twice = [torch.cat([tensor, tensor[:, :, -1:]], dim=2) for tensor in (q, k, v)]
    size = torch.ones(2, 9).index_fill(1, torch.tensor([8]), 2)
    torch.testing.assert_close(linear_angular(q, k, v, gain, size=size), linear_angular(*twice, gain)[:, :9])


@dtypes
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("tokens", [3, 20])
def test_zero_vectors_stay_zero(dtype, tolerance, which, tokens):
    inputs = [tensor.to(dtype) for tensor in drawn(4, 2, tokens, 8)]
    inputs[which][:, :, 1] = 0
    expected = linear_angular_reference(*[tensor.double() for tensor in inputs])
    with torch.no_grad():
        got = linear_angular(*inputs)
    assert got.isfinite().all() and (got - expected).abs().max() < tolerance
    trained = [tensor.requires_grad_() for tensor in inputs]
    linear_angular(*trained).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in trained)
    nothing = [torch.zeros_like(tensor) for tensor in inputs]
    assert not linear_angular(*nothing).any()


@pytest.mark.parametrize("tokens", [3, 7])
def test_linear_angular_gradients(tokens):
    inputs = [tensor.contiguous().requires_grad_() for tensor in drawn(2, 2, tokens, 5)]
    assert torch.autograd.gradcheck(linear_angular, inputs)
    beside = torch.randn(2, 2, tokens, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *some: linear_angular(*some[:4], beside=some[4]), [*inputs, beside])


@pytest.mark.parametrize(("tokens", "largest"), [(50, 8 * 8), (5, 5 * 8)])
def test_no_map_of_tokens_by_tokens_is_formed(tokens, largest, monkeypatch):
    """The product that comes first is d×d, or N×N where there are fewer tokens than channels."""
    q, k, v, gain = drawn(1, 1, tokens, 8)
    seen = []
    baddbmm = torch.baddbmm

    def watched(start, left, right, **options):
        seen.append(min(left.numel(), right.numel()))
        return baddbmm(start, left, right, **options)

    monkeypatch.setattr(angular.torch, "baddbmm", watched)
    linear_angular(q, k, v, gain)
    assert seen and max(seen) <= largest


def test_the_map_is_what_is_attended_with():
    q, k, v, gain = drawn(2, 2, 6, 4)
    mixed = unit(angular_map(q, k) @ v) * gain[:, None, None]
    torch.testing.assert_close(linear_angular(q, k, v, gain), mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (9, 1), (1, 3)])
@pytest.mark.parametrize("filters", [2, 6])
@dtypes
def test_depthwise_convolution(kernel, filters, dtype, tolerance):
    image, weight = torch.randn(2, 5, 7, 6), torch.randn(filters, *kernel)
    got = convolve(image.to(dtype), weight.to(dtype))
    expected = convolve_reference(image.to(dtype).double(), weight.to(dtype).double())
    assert got.dtype == dtype and ((got - expected).abs() <= tolerance * (1 + expected.abs())).all()


def test_convolutions_of_tokens_see_neighbours_in_their_order():
    v = torch.zeros(1, 12, 4)
    v[0, 5] = 1
    along = convolve_tokens(v, torch.ones(2, 3))
    assert along[0, :, 0].nonzero().flatten().tolist() == [4, 5, 6]
    around = convolve_grid(v, torch.ones(2, 3, 3), (3, 4))  # row 1, column 1 of three rows of four
    assert around[0, :, 0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_convolution_gradients():
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(convolve, (image, weight))
