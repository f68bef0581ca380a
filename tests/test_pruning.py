"""Token pruning: which tokens stay, what the rest becomes, bad parameters."""

from __future__ import annotations

import pytest
import torch

import leanvit
from leanvit.analysis import attention_map
from leanvit.methods.pruning import tokens_kept
from leanvit.ops import tokens as ops

from .contract import MODELS, photos, small_vit


@pytest.mark.parametrize("name", ["class token", "average pooling", "registers"])
@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_a_block_equals_its_definition(name, fuse):
    """Image by image, from the attention map of the dense block."""
    vit = small_vit(**MODELS[name])
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.TokenPruning(keep=0.6, at=(0,), fuse=fuse))
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    got = lean.blocks[0](lean.blocks.tokens(x))
    block, prefix = vit.blocks[0], vit.num_prefix_tokens
    maps = attention_map(block.attn, block.norm1(x)).mean(1)  # (B, N, N)
    x = x + block.attn(block.norm1(x))
    for image, (tokens, map) in enumerate(zip(x, maps, strict=True)):
        score = (map[0] if name != "average pooling" else map.mean(0))[prefix:]
        ranked = score.argsort(descending=True)
        kept, rest = ranked[:10].sort().values, ranked[10:]  # ⌈0.6·16⌉
        rows = [*tokens[:prefix], *tokens[prefix + kept]]
        if fuse:
            rows.append((tokens[prefix + rest] * score[rest, None]).sum(0) / score[rest].sum())
        rows = torch.stack(rows).unsqueeze(0)
        wanted = rows + block.mlp(block.norm2(rows))
        assert torch.allclose(got.x[image], wanted[0], atol=1e-5)
        assert got.positions[image].tolist() == [*kept.tolist(), *rest[:1].tolist()][: 10 + fuse]


def test_keeping_everything_is_exactly_the_dense_model():
    vit = small_vit()
    images = photos(vit)
    for fuse in (True, False):
        assert torch.equal(leanvit.slim(vit, leanvit.TokenPruning(keep=1.0, at=(0, 2), fuse=fuse))(images), vit(images))


def test_how_many_tokens_stay():
    assert [tokens_kept(100, keep) for keep in (0.07, 0.29, 0.291, 1.0)] == [7, 29, 30, 100]
    vit = small_vit(img_size=112)  # 196 patches
    for fuse, left in ((False, (138, 97, 68)), (True, (139, 99, 71))):
        lean = leanvit.slim(vit, leanvit.TokenPruning(at=(0, 1, 2), fuse=fuse))
        tokens = lean.blocks.tokens(vit.norm_pre(vit._pos_embed(vit.patch_embed(photos(vit, 2)))))
        for block, count in zip(lean.blocks, left, strict=False):
            tokens = block(tokens)
            assert tokens.patches.shape[1] == count


def test_default_places_three_stages():
    assert leanvit.slim(small_vit(depth=12), leanvit.TokenPruning()).lean.methods[0].at == (3, 6, 9)


def test_static_layers_are_measured_in_front_of_the_first_stage():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.DGSSA(layers="auto:2"), leanvit.TokenPruning(at=(2,)), images=photos(vit))
    assert lean.lean.methods[0].layers == (0, 1)


@pytest.mark.parametrize("sized", [False, True])
def test_attention_received_is_the_same_in_slices(sized, monkeypatch):
    q, k = torch.randn(2, 7, 3, 9, 4).unbind(0)
    size = torch.randint(1, 5, (7, 9)).float() if sized else None
    logits = q @ k.transpose(-2, -1) / 2
    maps = (logits if size is None else logits + size.log()[:, None, None]).softmax(-1)
    assert torch.allclose(ops.class_attention(q, k, size), maps[:, :, 0].mean(1), atol=1e-6)
    for limit in (1.0, 2500.0, 1e9):
        monkeypatch.setattr(ops, "SLICE", limit)
        assert torch.allclose(ops.attention_received(q, k, size), maps.mean((1, 2)), atol=1e-6)


def test_another_pooling_changes_what_scores_the_tokens():
    lean = leanvit.slim(small_vit(), leanvit.TokenPruning(at=(1,), keep=0.5))
    lean.reset_classifier(10, global_pool="avg")
    again = leanvit.slim(leanvit.restore(lean), leanvit.TokenPruning(at=(1,), keep=0.5))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(lean(images), again(images))


def test_the_fused_token_teaches_the_scores():
    """Which tokens stay has no gradient; how much each counts in the fused one has."""
    vit = small_vit(depth=2)
    lean = leanvit.slim(vit, leanvit.TokenPruning(at=(1,), keep=0.5))
    attended = lean.blocks[1].mix(lean.blocks[0](lean.blocks.tokens(torch.randn(2, 17, 48))))
    tokens = lean.blocks.tokens(attended.x.detach())
    fused = lean.blocks[1].reducers["pruning"](tokens, attended).x[:, -1]
    fused.sum().backward()
    assert lean.blocks[1].attn.qkv.weight.grad[:96].abs().sum() > 0
