"""Token merging: the matching, the means and sizes, schedules, bad parameters."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

import leanvit
from leanvit.methods import parse
from leanvit.ops import merge as ops
from leanvit.ops.merge import match, merge, merge_reference

from .contract import photos, small_vit


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("tokens", "prefix", "r"), [(17, 1, 3), (17, 1, 8), (16, 0, 8), (19, 0, 4), (22, 5, 6), (6, 2, 1)]
)
def test_merging_equals_its_definition(tokens, prefix, r, kernel, monkeypatch):
    monkeypatch.setattr(ops, "_takes_kernel", lambda x: kernel)
    torch.manual_seed(tokens + r)
    x, keys = torch.randn(3, tokens, 8), torch.randn(3, 2, tokens, 4)
    size = torch.randint(1, 6, (3, tokens)).float()
    matching = match(keys, size, r, prefix)
    wanted, wanted_sizes = merge_reference(x, size, keys, r, prefix)
    assert torch.allclose(merge(x, matching), wanted, atol=1e-5)
    assert torch.equal(matching.size, wanted_sizes)
    assert torch.equal(matching.size.sum(1), size.sum(1))
    assert torch.equal(merge(x, matching)[:, :prefix], x[:, :prefix])
    assert torch.allclose(merge(x.bfloat16(), matching).float(), wanted, atol=3e-2)


def test_kernels_and_torch_merge_alike(monkeypatch):
    keys, x = torch.randn(3, 3, 197, 64), torch.randn(3, 197, 192)
    size = torch.randint(1, 6, (3, 197)).float()
    fast = match(keys, size, 16, 1)
    merged, half = merge(x, fast), merge(x.bfloat16(), fast)
    monkeypatch.setattr(ops, "_takes_kernel", lambda x: False)
    plain = match(keys, size, 16, 1)
    for one, other in zip(fast, plain, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other))
    assert torch.allclose(merged, merge(x, plain), atol=1e-6)
    exact = merge(x.bfloat16().float(), plain)
    assert torch.allclose(half.float(), exact, rtol=1.01 * 2**-8, atol=1e-6)  # rounded once


def test_autocast_and_missing_numbers_do_no_harm():
    keys, size = torch.randn(2, 3, 17, 4), torch.ones(2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        assert match(keys, size, 4, 1).size.sum() == 34
    matching = match(torch.full_like(keys, float("nan")), size, 4, 1)
    assert all(gone.unique().numel() == 4 for gone in matching.gone) and matching.size.sum() == 34


def test_equal_tokens_are_merged_once(monkeypatch):
    """A blank image: every pair is as similar as any other, and r of them merge all the same."""
    x, keys, size = torch.ones(1, 17, 8), torch.ones(1, 3, 17, 4), torch.ones(1, 17)
    for kernel in (True, False):
        monkeypatch.setattr(ops, "_takes_kernel", lambda x, kernel=kernel: kernel)
        for blank in (keys, 0 * keys):
            matching = match(blank, size, 5, 1)
            assert matching.gone.unique().numel() == 5 and matching.size.sum() == 17
            assert torch.allclose(merge(x, matching), torch.ones(1, 12, 8))


@torch.no_grad()
def plain_merging(vit, images, r):
    """A ViT with merging as the paper describes it, by nothing but torch."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix, size = vit.num_prefix_tokens, torch.ones(x.shape[:2])
    for block in vit.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).reshape(*y.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * attn.scale + size.log()[:, None, None]).softmax(-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x, size = merge_reference(x, size, k, min(r, (x.shape[1] - prefix) // 2), prefix)
        x = x + block.mlp(block.norm2(x))
    return vit.forward_head(vit.norm(x)), size


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg", "class_token": False}, {"reg_tokens": 2}])
@pytest.mark.parametrize("r", [1, 3, 8])
@torch.no_grad()
def test_a_model_equals_the_plain_one(changes, r):
    vit = small_vit(**changes)
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.TokenMerging(r=r))
    wanted, size = plain_merging(vit, images, r)
    assert torch.allclose(lean(images), wanted, atol=1e-4)
    assert torch.allclose(leanvit.deploy(lean)(images), wanted, atol=1e-4)
    tokens = lean.forward_tokens(images, track=True)
    assert torch.equal(tokens.size, size)
    # Every patch went into exactly one token, which is the mean of its patches.
    assert torch.allclose((tokens.source > 0).sum(1), torch.ones(1, dtype=torch.long))
    assert torch.allclose(tokens.source.amax(-1), 1 / size[:, tokens.prefix :])


def test_nothing_merged_is_exactly_the_dense_model():
    vit = small_vit()
    images = photos(vit)
    for text in ("merging:r=0", "merging:keep=1", "merging:r=0,0,0,0"):
        assert torch.equal(leanvit.slim(vit, *parse(text))(images), vit(images))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("merging", [8, 4, 2, 1]),
        ("merging:r=2", [14, 12, 10, 8]),
        ("merging:r=0,5,0,2", [16, 11, 11, 9]),
        ("merging:r=3,first=2", [16, 16, 13, 10]),
        ("merging:keep=0.5", [14, 12, 10, 8]),
        ("merging:keep=0.25,first=1", [16, 12, 8, 4]),
    ],
)
def test_how_many_tokens_are_left(text, left):
    vit = small_vit()
    tokens = leanvit.slim(vit, *parse(text))
    x = tokens.blocks.tokens(vit.norm_pre(vit._pos_embed(vit.patch_embed(photos(vit)))))
    counts = []
    for block in tokens.blocks:
        x = block(x)
        counts.append(x.patches.shape[1])
    assert counts == left


def test_merged_blocks_come_after_static_layers():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.DGSSA(layers="auto:2"), leanvit.TokenMerging(r=4, first=2), images=photos(vit))
    assert lean.lean.methods[0].layers == (0, 1)
    assert "(2): dense, merging 4 tokens" in repr(lean)


@torch.no_grad()
def test_real_photos_get_the_logits_of_the_plain_model(shared_data):
    vit = timm.create_model("deit_tiny_patch16_224").eval()
    vit.load_state_dict(load_file(shared_data / "deit_tiny_patch16_224.safetensors"))
    from leanvit.data import image_batches

    images = next(iter(image_batches(str(shared_data / "imagenet-500.tar"), vit, 8, 8)))
    wanted, _ = plain_merging(vit, images, 16)
    assert (leanvit.deploy(leanvit.slim(vit, leanvit.TokenMerging(r=16)))(images) - wanted).abs().max() < 1e-3


@torch.no_grad()
def test_half_precision_compares_in_full_precision():
    torch.manual_seed(0)
    keys = torch.randn(4, 3, 17, 16)
    half, size = keys.bfloat16(), torch.ones(4, 17)
    assert torch.equal(match(half, size, 4, 1).gone, match(half.float(), size, 4, 1).gone)
