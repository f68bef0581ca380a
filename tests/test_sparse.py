"""Sparse attention as one operation, against the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from leanvit.ops import kernels, sparse
from leanvit.ops.sparse import (
    Predictor,
    connections,
    connections_reference,
    pack,
    scores_reference,
    sparse_attention,
    sparse_attention_reference,
)  # fmt: skip

from .threads import at_once, with_threads

shapes = pytest.mark.parametrize(
    ("batch", "heads", "prefix", "patches", "width", "rows"),
    [(1, 3, 1, 196, 64, 32), (3, 2, 0, 50, 32, 7), (2, 1, 5, 37, 16, 1), (1, 2, 1, 300, 80, 50), (9, 12, 1, 63, 16, 9)],
)


def a_case(batch, heads, prefix, patches, width, rows, dtype=torch.float32):
    """Queries, keys and values as a block has them, side by side in memory, and a predictor whose basis has zeros."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, prefix + patches, 3, heads, width).permute(2, 0, 3, 1, 4).to(dtype)
    basis = torch.rand(heads, rows, patches).square()
    basis = basis.where(basis > 0.2, 0.0)
    half = width // 2
    reduce = (torch.randn(heads, width, half) * width**-0.5 for _ in range(2))
    pooling = (4 * torch.randn(heads, patches, rows)).softmax(dim=1)  # a few keys each, so that coefficients differ
    return *qkv.unbind(0), Predictor(*reduce, pooling, basis)


def assert_same_choice(mask, q, k, predictor, places, budget):
    """The choice of the reference, except among scores that are equal but for rounding."""
    expected = connections_reference(q, k, predictor, places, budget)
    assert (mask.sum(-1) == expected.sum(-1)).all()
    prefix = q.shape[2] - (predictor.basis.shape[-1] if places is None else places.shape[1])
    scores = F.pad(scores_reference(q[:, :, prefix:], k[:, :, prefix:], predictor, places), (prefix, 0, prefix, 0))
    border = scores.sort(-1, descending=True).values[..., budget - prefix - 1].unsqueeze(-1).expand_as(scores)
    assert torch.allclose(scores[mask != expected], border[mask != expected], rtol=1e-5)
    assert (mask != expected).float().mean() < 1e-4


def masked(q, k, v, mask):
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def run(q, k, v, predictor, places, budget, threshold=0.0):
    return sparse_attention(q, k, v, predictor, pack(predictor), places, budget, threshold)


@shapes
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.7])
@torch.no_grad()
def test_agrees_with_the_reference(batch, heads, prefix, patches, width, rows, keep):
    q, k, v, predictor = a_case(batch, heads, prefix, patches, width, rows)
    budget = max(math.ceil(keep * (prefix + patches)), prefix + 1)
    mask = connections(q, k, predictor, None, budget)
    assert_same_choice(mask, q, k, predictor, None, budget)
    assert (mask[:, :, prefix:].sum(-1) == budget).all() and mask[:, :, :prefix].all() and mask[..., :prefix].all()
    got = run(q, k, v, predictor, None, budget)
    assert got.shape == (batch, prefix + patches, heads * width) and got.is_contiguous()
    assert (got - masked(q, k, v, mask)).abs().max() < 1e-5


@torch.no_grad()
def test_many_tokens():
    q, k, v, predictor = a_case(1, 1, 1, 4096, 64, 40)
    mask = connections(q, k, predictor, None, 410)
    assert_same_choice(mask, q, k, predictor, None, 410)
    assert (run(q, k, v, predictor, None, 410) - masked(q, k, v, mask)).abs().max() < 1e-5


@shapes
@torch.no_grad()
def test_bf16(batch, heads, prefix, patches, width, rows):
    q, k, v, predictor = a_case(batch, heads, prefix, patches, width, rows, torch.bfloat16)
    mask = connections(q, k, predictor, None, prefix + 9)
    assert torch.equal(mask, connections(q.float(), k.float(), predictor, None, prefix + 9))
    got = run(q, k, v, predictor, None, prefix + 9)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, masked(q, k, v, mask).bfloat16()) or (got - masked(q, k, v, mask)).abs().max() < 1e-2


@torch.no_grad()
def test_patches_that_are_left_use_their_own_places():
    q, k, v, predictor = a_case(3, 2, 1, 60, 32, 10)
    places = torch.stack([torch.randperm(60)[:41] for _ in range(3)])
    index = torch.cat([torch.zeros(3, 1, dtype=torch.long), 1 + places], dim=1)[:, None, :, None]
    q, k, v = (x.gather(2, index.expand(-1, 2, -1, 32)) for x in (q, k, v))
    mask = connections(q, k, predictor, places, 12)
    assert torch.equal(mask, connections_reference(q, k, predictor, places, 12))
    assert (run(q, k, v, predictor, places, 12) - masked(q, k, v, mask)).abs().max() < 1e-5
    one = Predictor(*predictor[:2], predictor.pooling[:, places[0]], predictor.basis[:, :, places[0]])
    assert torch.equal(mask[:1], connections_reference(q[:1], k[:1], one, None, 12))


@pytest.mark.parametrize("some", [False, True])
@torch.no_grad()
def test_a_head_is_pooled_in_parts(some):
    q, k, v, predictor = a_case(2, 2, 1, 400, 32, 20)
    places = None
    if some:  # 333 patches make five parts, the last one shorter
        places = torch.stack([torch.randperm(400)[:333] for _ in range(2)])
        q, k, v = (x[:, :, :334] for x in (q, k, v))
    results = with_threads((1, 2, 5), lambda: run(q, k, v, predictor, places, 40))
    mask = connections(q, k, predictor, places, 40)
    assert torch.equal(mask, connections_reference(q, k, predictor, places, 40))
    assert (results[0] - masked(q, k, v, mask)).abs().max() < 1e-5
    assert all(torch.equal(result, results[0]) for result in results)


@shapes
@torch.no_grad()
def test_every_key_is_dense_attention(batch, heads, prefix, patches, width, rows):
    q, k, v, predictor = a_case(batch, heads, prefix, patches, width, rows)
    for budget in (prefix + patches, prefix + patches + 5):
        assert connections(q, k, predictor, None, budget).all()
        assert (run(q, k, v, predictor, None, budget) - masked(q, k, v, None)).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_ties_go_to_the_lower_index(prefix):
    q, k, _, predictor = a_case(2, 2, prefix, 50, 16, 3)
    flat = predictor._replace(basis=torch.zeros(2, 3, 50))
    mask = connections(q, k, flat, None, prefix + 7)
    assert torch.equal(mask, connections_reference(q, k, flat, None, prefix + 7))
    assert mask[:, :, prefix:, : prefix + 7].all()
    steps = predictor._replace(basis=torch.arange(50).div(10, rounding_mode="floor").float().expand(2, 3, 50))
    mask = connections(q, k, steps, None, prefix + 14)  # the ten best and four of those that tie behind them
    assert torch.equal(mask, connections_reference(q, k, steps, None, prefix + 14))
    assert mask[0, 0, -1, prefix:].nonzero().flatten().tolist() == [30, 31, 32, 33, *range(40, 50)]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.9])
@torch.no_grad()
def test_threshold(prefix, threshold):
    q, k, v, predictor = a_case(2, 2, prefix, 50, 16, 12)
    mask = connections(q, k, predictor, None, prefix + 20, threshold)
    assert torch.equal(mask, connections_reference(q, k, predictor, None, prefix + 20, threshold))
    assert (mask.sum(-1) >= 1).all()
    assert (run(q, k, v, predictor, None, prefix + 20, threshold) - masked(q, k, v, mask)).abs().max() < 1e-5


@torch.no_grad()
def test_no_array_of_scores_is_formed():
    q, k, v, predictor = a_case(2, 3, 1, 2304, 16, 20)
    packed = pack(predictor)
    run(q, k, v, predictor, None, 20)
    with torch.profiler.profile(profile_memory=True) as profiler:
        sparse_attention(q, k, v, predictor, packed, None, 20)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
    assert taken < 4 * (q.numel() + k.numel() + v.numel()) * 2 < 4 * 2 * 3 * 2305**2 / 4


@torch.no_grad()
def test_any_number_of_threads_gives_the_same():
    q, k, v, predictor = a_case(5, 3, 1, 63, 32, 10)
    results = with_threads((1, 2, 5), lambda: run(q, k, v, predictor, None, 9))
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_calls_from_several_threads_do_not_meet():
    q, k, v, predictor = a_case(4, 3, 1, 63, 32, 10)
    expected = run(q, k, v, predictor, None, 9)
    results = at_once(lambda: run(q, k, v, predictor, None, 9))
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


@torch.no_grad()
def test_without_torchs_own_threads(monkeypatch):
    q, k, v, predictor = a_case(4, 3, 1, 63, 32, 10)
    expected = run(q, k, v, predictor, None, 9)
    monkeypatch.setattr(kernels, "openmp", lambda: None)
    assert torch.equal(run(q, k, v, predictor, None, 9), expected)


@torch.no_grad()
def test_other_widths_and_types_use_the_reference():
    q, k, v, predictor = a_case(1, 2, 1, 20, 24, 4)
    assert not sparse.takes_kernel(q)
    expected = sparse_attention_reference(q, k, v, predictor, None, 6)
    assert torch.equal(run(q, k, v, predictor, None, 6), expected)


def test_gradients_take_the_reference():
    q, k, v, predictor = a_case(1, 2, 1, 20, 16, 4)
    run(q.requires_grad_(), k, v, predictor, None, 6).sum().backward()
    assert q.grad is not None and q.grad.abs().max() > 0


def test_the_operation_is_known_to_torch():
    q, k, v, predictor = a_case(2, 2, 1, 20, 16, 4)
    arguments = (q, k, v, list(pack(predictor)), None, 20, 4, 6, 0.0)
    torch.library.opcheck(torch.ops.leanvit.sparse_attention.default, arguments)


def test_compiled_kernels_are_kept_where_they_can_be(tmp_path):
    code = (
        "import torch; from leanvit.ops.sparse import Predictor, pack, sparse_attention;"
        "q = torch.randn(1, 1, 9, 16); p = Predictor(torch.randn(1, 16, 8), torch.randn(1, 16, 8), torch.rand(1, 8, 2),"
        "torch.rand(1, 2, 8)); print(sparse_attention(q, q, q, p, pack(p), None, 3).shape)"
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "torch.Size([1, 9, 16])"
        runs.append((sparse.NOTICE in done.stderr, {file: file.stat().st_mtime_ns for file in cache.rglob("*.nbc")}))
    (announced, compiled), (_, kept) = runs
    assert announced and compiled and kept == compiled  # a busy machine may take long to load it, too


def test_kernels_without_a_folder_to_write_to(monkeypatch):
    from leanvit.ops import sparse_kernel

    compiled = []

    def compile_kernels(width, disk):
        if disk:
            raise RuntimeError("cannot cache function: no locator available")
        compiled.append(width)
        return "pool", "attend"

    monkeypatch.setattr(sparse_kernel, "compile_kernels", compile_kernels)
    assert sparse._kernels.__wrapped__(48) == ("pool", "attend") and compiled == [48]
