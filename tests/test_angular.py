"""Linear-angular attention and the depthwise convolutions against their references."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanvit.ops import angular, kernels
from leanvit.ops.angular import (
    angular_attention,
    angular_attention_reference,
    angular_map,
    linear_angular,
    linear_angular_reference,
    places,
    takes_kernel,
    unit,
)  # fmt: skip
from leanvit.ops.depthwise import convolve, convolve_grid, convolve_reference, convolve_tokens

from .threads import at_once, with_threads

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


# ---- the CPU's operation

CASES = {  # batch, heads, prefix, grid, width, filter
    "deit": (1, 3, 1, (14, 14), 64, (5, 5)),
    "no prefix": (2, 2, 0, (3, 7), 16, (3, 3)),
    "a tall grid": (1, 2, 5, (9, 4), 32, (3, 5)),
    "many prefix tokens": (2, 1, 9, (5, 5), 48, (5, 5)),
    "fewer tokens than channels": (3, 2, 2, (2, 2), 64, (1, 1)),
    "one patch": (1, 1, 3, (1, 1), 16, (1, 1)),
    "a filter as large as the grid": (1, 2, 1, (5, 5), 16, (5, 5)),
    "along the tokens": (2, 2, 0, (65, 1), 64, (9, 1)),
    "fewer tokens than taps": (1, 1, 0, (3, 1), 16, (9, 1)),
    "many heads": (8, 4, 1, (4, 12), 16, (3, 3)),
}
cases = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def a_case(batch, heads, prefix, grid, width, kernel, dtype=torch.float32, filters=None):
    """Arguments of `angular_attention`; by default each channel has a filter of its own."""
    q, k, v, gain = drawn(batch, heads, prefix + grid[0] * grid[1], width, dtype)
    weight = torch.randn(filters or heads * width, *kernel, generator=torch.Generator().manual_seed(1))
    return q, k, v, gain, (weight / weight[0].numel() ** 0.5).to(dtype), prefix, grid


def expected(q, k, v, gain, filters, *layout):
    return angular_attention_reference(q.double(), k.double(), v.double(), gain.double(), filters.double(), *layout)


@cases
@dtypes
@torch.no_grad()
def test_the_operation_agrees_with_the_reference(case, dtype, tolerance):
    arguments = a_case(*case, dtype)
    assert takes_kernel(*arguments[:5])
    got, reference = angular_attention(*arguments), expected(*arguments)
    assert got.dtype == dtype and got.shape == reference.shape and got.is_contiguous()
    assert ((got - reference).abs() <= tolerance * (1 + reference.abs())).all()


@torch.no_grad()
def test_the_operation_takes_a_filter_a_head_and_any_layout():
    q, k, v, *others = a_case(2, 3, 1, (4, 5), 32, (3, 3), filters=3)
    reference = expected(q, k, v, *others)
    assert (angular_attention(q, k, v, *others) - reference).abs().max() < 1e-5
    apart = [q.contiguous(), k.transpose(-1, -2).contiguous().transpose(-1, -2), v.contiguous()]
    assert (angular_attention(*apart, *others) - reference).abs().max() < 1e-5


@torch.no_grad()
def test_patches_that_are_left_have_their_neighbours():
    q, k, v, gain, filters, prefix, grid = a_case(3, 2, 2, (6, 5), 16, (3, 3))
    positions = torch.stack([torch.randperm(30)[:17] for _ in range(3)])
    q, k, v = (x[:, :, : 2 + 17] for x in (q, k, v))
    reference = expected(q, k, v, gain, filters, prefix, grid, positions)
    assert (angular_attention(q, k, v, gain, filters, prefix, grid, positions) - reference).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", [0, 1, 5, 40])
@pytest.mark.parametrize("grid", [(1, 1), (4, 7), (7, 4), (20, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 7), (9, 1)])
def test_places_of_neighbours(prefix, grid, kernel):
    """A tap meets the patch that is that far away on the grid, or nothing; prefix tokens are met by none."""
    *tables, room = places(prefix, grid, kernel)
    place, distances = (table.numpy() for table in tables)
    who = {int(at): token for token, at in enumerate(place)}
    assert len(who) == len(place) == prefix + grid[0] * grid[1]
    for token, at in enumerate(place):
        found = [who.get(int(at + away)) for away in distances]
        assert (at + distances >= 0).all() and (at + distances < room).all()
        row, column = np.divmod(token - prefix, grid[1])
        for tap, met in enumerate(found):
            down, right = row + tap // kernel[1] - kernel[0] // 2, column + tap % kernel[1] - kernel[1] // 2
            inside = token >= prefix and 0 <= down < grid[0] and 0 <= right < grid[1]
            itself = token if tap == len(found) // 2 else None
            assert met == (prefix + down * grid[1] + right if inside else itself)


@dtypes
@pytest.mark.parametrize("which", range(3))
@torch.no_grad()
def test_zero_vectors_in_the_operation(dtype, tolerance, which):
    arguments = a_case(2, 2, 1, (3, 3), 16, (3, 3), dtype)
    arguments[which][:, :, 1] = 0
    got = angular_attention(*arguments)
    assert got.isfinite().all() and (got - expected(*arguments)).abs().max() < tolerance
    for tensor in arguments[:3]:
        tensor.zero_()
    assert not angular_attention(*arguments).any()


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 5])
def test_any_number_of_threads_gives_the_same(images):
    arguments = a_case(images, 3, 1, (7, 9), 64, (5, 5))
    results = with_threads((1, 2, 5, 40), lambda: angular_attention(*arguments))
    assert all(torch.equal(result, results[0]) for result in results)


def test_work_is_shared_out_where_heads_do_not_divide_among_threads(monkeypatch):
    for threads, heads, stages in ((1, 3, 1), (2, 3, 2), (2, 6, 1), (2, 12, 1), (16, 12, 2), (16, 96, 1)):
        monkeypatch.setattr(angular.torch, "get_num_threads", lambda threads=threads: threads)
        assert len(angular._stages(heads, 197, 64, 48)) == stages
    for width in (16, 48, 64):
        (parts, planes, _), (blocks, _, queries) = angular._stages(3, 197, width, 48)
        assert (parts - 1) * planes < width / 16 <= parts * planes
        assert (blocks - 1) * queries < 197 <= blocks * queries


@torch.no_grad()
def test_calls_from_several_threads_do_not_meet():
    arguments = a_case(2, 3, 1, (8, 8), 32, (3, 3))
    reference = angular_attention(*arguments)
    results = at_once(lambda: angular_attention(*arguments))
    assert len(results) == 80 and all(torch.equal(result, reference) for result in results)


@torch.no_grad()
def test_without_torchs_own_threads(monkeypatch):
    arguments = a_case(4, 3, 1, (8, 8), 32, (3, 3))
    reference = angular_attention(*arguments)
    monkeypatch.setattr(kernels, "openmp", lambda: None)
    monkeypatch.setattr(angular.torch, "get_num_threads", lambda: 3)
    assert torch.equal(angular_attention(*arguments), reference)


def test_where_the_operation_does_not_run():
    q, k, v, gain, filters, *_ = a_case(1, 2, 1, (3, 3), 16, (3, 3))
    assert takes_kernel(q, k, v, gain, filters)
    assert not takes_kernel(q[..., :8], k, v, gain, filters)
    assert not takes_kernel(q, k, v, gain.double(), filters)
    assert not takes_kernel(*(x.half() for x in (q, k, v, gain, filters)))
    assert not takes_kernel(q.to("meta"), k, v, gain, filters)
    assert not takes_kernel(q, k, v, gain, filters.clone().requires_grad_())
    with torch.autocast("cpu"):
        assert not takes_kernel(q, k, v, gain, filters)


@torch.no_grad()
def test_no_array_of_tokens_by_tokens_is_formed_by_the_operation():
    arguments = a_case(1, 3, 1, (48, 48), 16, (5, 5))
    angular_attention(*arguments)
    with torch.profiler.profile(profile_memory=True) as profiler:
        angular_attention(*arguments)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
    assert taken < 4 * 4 * arguments[0].numel() < 4 * 3 * 2305**2 / 4


@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 5, 2], [8, 1, 7]])])
def test_the_operation_is_known_to_torch(positions):
    q, k, v, gain, filters, prefix, grid = a_case(2, 2, 1, (3, 3), 16, (3, 3))
    if positions is not None:
        q, k, v = (x[:, :, :4] for x in (q, k, v))
    arguments = (q, k, v, gain, filters, prefix, list(grid), positions)
    torch.library.opcheck(torch.ops.leanvit.angular_attention.default, arguments)


@torch.no_grad()
def test_the_operation_is_counted():
    arguments = a_case(2, 3, 1, (4, 4), 16, (3, 3))
    with FlopCounterMode(display=False) as counter:
        angular_attention(*arguments)
    assert counter.get_total_flops() == 2 * 2 * (2 * 17 * 48 * 16 + 17 * 48 * 9)


def test_compiled_kernels_are_kept(tmp_path):
    code = (
        "import torch; from leanvit.ops.angular import angular_attention; q = torch.randn(1, 1, 9, 16);"
        "print(angular_attention(q, q, q, torch.ones(1), torch.ones(1, 3, 3), 0, (3, 3)).shape)"
    )
    environment, said, kept = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, [], []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "torch.Size([1, 9, 16])"
        said.append(angular.NOTICE in done.stderr)
        kept.append([(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*.nb*"))])
    assert said[0] and kept[0] and kept[0] == kept[1]  # what comes from disk may take longer than PATIENCE, too


def test_kernels_without_a_folder_to_write_to():
    compiled = []

    def compile_kernel(width, disk):
        if disk:
            raise RuntimeError("cannot cache function: no locator available")
        compiled.append(width)
        return "kernel"

    assert kernels.compiled(compile_kernel, 48, "notice") == "kernel" and compiled == [48]
