"""Which form runs on which processor: nothing is emulated, and oneDNN steps aside where it is not faster."""

from __future__ import annotations

import importlib

import pytest
import torch

import leanvit
import leanvit.ops.attention
import leanvit.ops.linear
import leanvit.ops.processor
from leanvit.ops.aggregate import aggregate, aggregation_weights
from leanvit.ops.angular import linear_angular
from leanvit.ops.attention import attention
from leanvit.ops.depthwise import convolve
from leanvit.ops.linear import column_major, linear, linear_reference
from leanvit.ops.processor import emulates, has_bf16, prefers_onednn, warn_of_emulation
from leanvit.ops.static import static_attention

OPERATIONS = {
    "linear": (linear, [(2, 5, 8), (4, 8), (4,)]),
    "static attention": (static_attention, [(2, 5, 5), (3, 5, 8)]),
    "linear-angular": (linear_angular, [(2, 2, 9, 4)] * 3 + [(2,)]),
    "convolution": (convolve, [(2, 4, 4, 6), (6, 3, 3)]),
    "aggregation weights": (aggregation_weights, [(2, 9, 5), (5, 4), (9, 4)]),
    "aggregation": (aggregate, [(2, 9, 5), (2, 4, 9)]),
}


@pytest.fixture
def without_bf16(monkeypatch):
    """A processor without bf16 arithmetic."""
    monkeypatch.setattr(leanvit.ops.processor, "has_bf16", lambda device_type="cpu": False)
    monkeypatch.setattr(leanvit.ops.attention, "has_bf16", lambda device_type="cpu": False)
    monkeypatch.setattr(leanvit.ops.linear, "prefers_onednn", lambda dtype: False)


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_without_bf16_arithmetic_an_operation_computes_in_fp32(name, without_bf16):
    operation, shapes = OPERATIONS[name]
    half = [torch.randn(shape).bfloat16() for shape in shapes]
    got = operation(*half)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, operation(*(x.float() for x in half)).bfloat16())


@torch.no_grad()
def test_what_stays_in_fp32_is_not_touched(without_bf16):
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert linear(x, weight).dtype is torch.float32 and not emulates(x)


@torch.no_grad()
def test_without_bf16_arithmetic_attention_forms_no_map(monkeypatch, without_bf16):
    def refuse(*_):
        raise AssertionError("a bf16 map was formed")

    monkeypatch.setattr(leanvit.ops.attention, "_by_the_map", refuse)
    q = torch.randn(2, 3, 197, 16).bfloat16()
    assert attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("ending", ["", "none", "tanh", "residual"])
@torch.no_grad()
def test_linear_where_onednn_is_not_preferred(ending, monkeypatch):
    monkeypatch.setattr(leanvit.ops.linear, "prefers_onednn", lambda dtype: False)
    x, weight, bias, residual = torch.randn(2, 7, 16), torch.randn(24, 16), torch.randn(24), torch.randn(2, 7, 24)
    kept = residual.clone()
    then = {"residual": residual} if ending == "residual" else {"gelu": ending}
    got = linear(x, column_major(weight), bias, **then)
    assert (got - linear_reference(x, weight, bias, **then)).abs().max() < 1e-5
    assert torch.equal(residual, kept)


def test_a_processor_is_asked_what_it_has():
    assert has_bf16("mps")
    assert has_bf16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert prefers_onednn(torch.bfloat16) == has_bf16()
    assert not prefers_onednn(torch.float64)


def test_bf16_that_would_be_emulated_is_announced(monkeypatch):
    monkeypatch.setattr(leanvit.ops.processor, "has_bf16", lambda device_type="cpu": False)
    with pytest.warns(UserWarning, match="this CPU has no bf16 arithmetic and emulates it"):
        warn_of_emulation("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, {"fp32", "bf16"}), (False, {"fp32"})])
def test_bench_times_bf16_by_default_where_it_is_computed(native, expected, monkeypatch, tiny_vit):
    monkeypatch.setattr(importlib.import_module("leanvit.bench"), "has_bf16", lambda kind: native)
    rows = leanvit.bench({"dense": tiny_vit}, batch_sizes=[1], iterations=1, warmup=0, progress=False)
    assert {row["precision"] for row in rows} == expected
