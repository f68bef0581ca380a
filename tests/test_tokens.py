"""What travels between blocks: removing, merging and aggregating tokens, and who may come behind that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch

import leanvit
from leanvit.attention import attend, dense_attention
from leanvit.methods import LeanModule, Method, Reducer
from leanvit.model import Tokens, check_order
from leanvit.ops.attention import attention, attention_reference

from .contract import MODELS, photos, small_vit


def some_tokens(track: bool = True) -> Tokens:
    return Tokens(torch.randn(2, 1 + 6, 4), prefix=1, grid=(2, 3), track=track)


def one_each(tokens: Tokens) -> torch.Tensor:
    """Dense tokens that name their patch, so that `reduce` shows what went where: ``(B, P + h·w, h·w)``."""
    count = tokens.grid[0] * tokens.grid[1]
    return torch.cat([torch.zeros(tokens.prefix, count), torch.eye(count)]).expand(len(tokens.x), -1, -1)


def test_kept_tokens_keep_values_and_places():
    tokens = some_tokens()
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    kept = tokens.keep(index)
    for image in range(2):
        assert torch.equal(kept.x[image], tokens.x[image, [0, *(1 + index[image]).tolist()]])
    assert torch.equal(kept.positions, index) and kept.reduced and kept.size is None
    again = kept.keep(torch.tensor([[1, 2], [0, 2]]))
    assert again.positions.tolist() == [[2, 5], [1, 4]]
    assert again.reduce(one_each(again))[:, 1:].argmax(-1).tolist() == [[2, 5], [1, 4]]


def test_removed_patches_have_the_value_they_had_last():
    tokens = some_tokens()
    first = tokens.keep(torch.tensor([[0, 2, 5], [1, 3, 4]]))
    first = first.with_x(first.x + 10)  # a block
    second = first.keep(torch.tensor([[1], [2]]))
    second = second.with_x(second.x + 100)
    grid = second.expand()
    assert torch.allclose(grid[0, 1:][[1, 3, 4]], tokens.x[0, 1:][[1, 3, 4]])
    assert torch.allclose(grid[0, 1:][[0, 5]], tokens.x[0, 1:][[0, 5]] + 10)
    assert torch.allclose(grid[0, 1:][2], tokens.x[0, 1:][2] + 110)
    assert torch.allclose(grid[1, 0], tokens.x[1, 0] + 110)


def test_a_fused_token_is_a_mean_at_the_place_of_its_heaviest():
    tokens = some_tokens()
    weights = torch.tensor([[0, 0.25, 0, 0.75, 0, 0], [0.5, 0, 0.3, 0, 0, 0.2]])
    kept = tokens.keep(torch.tensor([[0, 2], [1, 3]]), fused=weights)
    assert torch.allclose(kept.x[:, -1], (weights.unsqueeze(-1) * tokens.patches).sum(1))
    assert kept.positions.tolist() == [[0, 2, 3], [1, 3, 0]]
    assert torch.allclose(kept.reduce(one_each(kept))[:, -1], weights)
    assert torch.allclose(kept.expand()[0, [2, 4]], kept.x[0, [3, 3]])


def test_merged_tokens_have_sizes_and_no_place():
    tokens = some_tokens().keep(torch.tensor([[0, 2, 5], [1, 3, 4]]))
    size = torch.tensor([[1.0, 2, 1], [1, 2, 1]])

    def merge(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[:, 0], (values[:, 1] + values[:, 2]) / 2, values[:, 3]], dim=1)

    merged = tokens.merge(merge, size)
    assert merged.positions is None and torch.equal(merged.size, size) and merged.x.shape == (2, 3, 4)
    assert merged.reduce(one_each(merged))[0, 1].tolist() == [0.5, 0, 0.5, 0, 0, 0]
    assert torch.allclose(merged.expand()[0, [1, 3]], merged.x[0, [1, 1]])
    assert torch.allclose(merged.expand()[:, 1:][0, [1, 3, 4]], tokens.expand()[:, 1:][0, [1, 3, 4]])
    kept = merged.keep(torch.tensor([[0], [1]]))
    assert kept.size.tolist() == [[1, 2], [1, 1]] and kept.positions is None
    pooled = merged.aggregate(merged.patches.mean(1, keepdim=True), torch.full((2, 1, 2), 0.5))
    assert pooled.size is None
    assert torch.allclose(pooled.source.sum(-1), torch.ones(2, 1)) and float(pooled.source[0, 0, 5]) == 0.5


def test_nothing_is_kept_that_inference_has_no_use_for():
    tokens = some_tokens(track=False).keep(torch.tensor([[0, 2], [1, 3]]))
    assert tokens.source is None and tokens.removed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_counts_a_key_so_often(dtype):
    """Attention to a key of size s is attention to s equal keys, by every path."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 3, 40, 16).to(dtype) for _ in range(3))
    size = torch.randint(1, 5, (8, 40)).float()
    got = attention(q, k, v, size=size)
    for image in range(8):
        often = size[image].long()
        keys, values = (part[image : image + 1].repeat_interleave(often, dim=2) for part in (k, v))
        wanted = attention_reference(q[image : image + 1].float(), keys.float(), values.float())
        assert torch.allclose(got[image : image + 1].float(), wanted, atol=1e-5 if dtype is torch.float32 else 3e-2)
    assert torch.allclose(attention_reference(q.float(), k.float(), v.float(), size=size), got.float(), atol=3e-2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dense_attention_is_timms_own_and_tells_its_queries_and_keys(name):
    vit = small_vit(**MODELS[name])
    module, x = vit.blocks[1].attn, torch.randn(2, 9, vit.embed_dim)
    told = dense_attention(module, x, None)
    assert torch.allclose(told.x, module(x), atol=1e-5)
    assert told.q.shape == told.k.shape == (2, 3, 9, 16)
    assert attend(module, x, Tokens(x, 1, (2, 4))).q is None


def test_dropout_of_attention_stays_where_size_is_known():
    vit = small_vit(attn_drop_rate=0.5).train()
    x = torch.randn(2, 9, vit.embed_dim)
    once, again = (dense_attention(vit.blocks[1].attn, x, torch.ones(2, 9)).x for _ in range(2))
    assert not torch.allclose(once, again)


class Places(LeanModule):
    """A stage that must know where tokens are, and tells."""

    method: ClassVar[str] = "places"
    needs_positions: ClassVar[bool] = True

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens


class Half(Reducer):
    """Keeps every other token."""

    method: ClassVar[str] = "half"
    keeps_positions: ClassVar[bool] = True
    needs_attention: ClassVar[tuple[str, ...]] = ("queries", "keys")

    def forward(self, tokens: Tokens, attended: object) -> Tokens:
        assert attended.q.shape[2] == attended.k.shape[2] == tokens.x.shape[1]
        count = tokens.patches.shape[1]
        return tokens.keep(torch.arange(0, count, 2).expand(tokens.x.shape[0], -1))


@dataclass(frozen=True)
class Put(Method):
    """Puts modules where a test wants them; not registered."""

    name: ClassVar[str] = "put"
    stages: tuple[tuple[int, LeanModule], ...] = ()
    reducers: tuple[tuple[int, LeanModule], ...] = ()

    def swap_in(self, lean):
        for index, module in self.stages:
            lean.blocks[index].stages["put"] = module
        for index, module in self.reducers:
            lean.blocks[index].reducers["put"] = module


def test_a_reducer_sits_between_attention_and_mlp():
    vit = small_vit()
    images = photos(vit)
    lean = leanvit.slim(vit, Put(reducers=((1, Half()),)))
    assert lean.forward_features(images).shape == (len(images), 1 + 8, vit.embed_dim)
    with torch.no_grad():
        assert (leanvit.deploy(lean)(images) - lean(images)).abs().max() < 1e-4
    x = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
    block = vit.blocks[1]
    x = x + block.attn(block.norm1(x))
    x = torch.cat([x[:, :1], x[:, 1::2]], dim=1)
    x = x + block.mlp(block.norm2(x))
    for block in vit.blocks[2:]:
        x = block(x)
    assert torch.allclose(lean.forward_features(images), vit.norm(x), atol=1e-5)
    assert torch.equal(leanvit.restore(lean)(images), vit(images))


def test_what_may_come_behind_a_reduction():
    vit = small_vit()
    leanvit.slim(vit, Put(stages=((2, Places()),), reducers=((1, Half()),)))  # places are known behind pruning
    with pytest.raises(leanvit.MethodError, match="places: block 2 needs to know the place of each token, but glad"):
        leanvit.slim(vit, leanvit.GLAD(at=(1,)), Put(stages=((2, Places()),)))
    with pytest.raises(
        leanvit.MethodError, match="glad: block 2 needs the same tokens in every image, but half reduces"
    ):
        leanvit.slim(vit, leanvit.GLAD(at=(2,)), Put(reducers=((1, Half()),)))
    with pytest.raises(
        leanvit.MethodError, match=r"dgssa: block 2 needs every token at its place, but half .* in block 1"
    ):
        leanvit.slim(vit, leanvit.DGSSA(layers=(2,)), Put(reducers=((1, Half()),)))
    check_order(leanvit.slim(vit, leanvit.GLAD(at=(1,)), Put(reducers=((1, Half()),))))


def test_an_attention_that_cannot_tell_is_refused_by_name():
    message = r"half: block 0 cannot choose tokens: its attention \(static attention.*\) has no queries to tell"
    with pytest.raises(leanvit.MethodError, match=message):
        leanvit.slim(small_vit(), leanvit.DGSSA(layers=(0,)), Put(reducers=((0, Half()),)))


def test_a_distilled_model_counts_two_prefix_tokens():
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=10
    ).eval()
    tokens = leanvit.slim(vit, Put(reducers=((0, Half()),))).forward_tokens(torch.randn(2, 3, 32, 32), track=True)
    assert tokens.x.shape[1] == 2 + tokens.positions.shape[1] and tokens.positions[0].tolist() == [0, 2]
