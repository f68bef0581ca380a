"""Surgery: what goes in, what is refused, what comes back."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import leanvit
from leanvit.methods import parse
from leanvit.model import LeanBlocks
from leanvit.ops.linear import blocks_of
from leanvit.ops.processor import prefers_onednn

from .contract import MODELS, photos, small_vit


@pytest.mark.parametrize("name", MODELS)
def test_no_method_gives_exactly_the_dense_outputs(name):
    vit = small_vit(**MODELS[name])
    images = photos(vit)
    lean = leanvit.slim(vit)
    assert torch.equal(lean(images), vit(images))
    assert torch.equal(lean.forward_features(images), vit.forward_features(images))
    for got, want in zip(lean.forward_intermediates(images)[1], vit.forward_intermediates(images)[1], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_deployed_without_a_method_is_the_dense_model(name):
    vit = small_vit(**MODELS[name])
    images = photos(vit)
    assert (leanvit.deploy(leanvit.slim(vit))(images) - vit(images)).abs().max() < 1e-4
    assert leanvit.count(leanvit.slim(vit)).macs == leanvit.count(vit).macs


def test_a_distilled_model_with_two_prefix_tokens():
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=10
    )
    lean = leanvit.slim(vit.eval(), leanvit.DGSSA(layers=(0,)), leanvit.GLAD(at=(2,)))
    assert lean(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert isinstance(lean, type(vit)) and type(leanvit.restore(lean)) is type(vit)


def test_the_number_of_classes_can_be_reset(tiny_vit):
    lean = leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,)))
    lean.reset_classifier(3)
    assert lean(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert {"head.weight", "head.bias"} <= lean.new_parameter_names()  # and trained at the rate of what is new
    assert leanvit.restore(lean).head.out_features == 3


@pytest.mark.parametrize("methods", ["dgssa:layers=0", "glad:at=2", "castling:kernel=3", "sparsifiner:keep=0.5"])
def test_as_many_patches_on_another_grid_are_refused(methods):
    lean = leanvit.slim(small_vit(img_size=(32, 64), dynamic_img_size=True), *parse(methods))
    upright = torch.randn(1, 3, 64, 32)
    for model in (lean, leanvit.deploy(lean, force=True)):
        for call in (model, model.forward_tokens, model.forward_intermediates):
            with pytest.raises(leanvit.InputSizeError, match=r"images of 8×4 patches, and .* a grid of 4×8; call set_"):
                call(upright)
    lean.set_input_size((64, 32))
    assert lean(upright).shape == (1, 10)


def test_two_walks_at_a_time_do_not_meet(tiny_vit):
    lean = leanvit.slim(tiny_vit, leanvit.GLAD(at=(1, 2)))
    images = torch.randn(2, 3, 32, 32)
    embedded = tiny_vit.patch_drop(tiny_vit._pos_embed(tiny_vit.patch_embed(images)))
    walks = [lean.blocks.steps(), lean.blocks.steps()]
    xs = [embedded, embedded.flip(0)]
    for first, second in zip(*walks, strict=True):
        xs = [first(xs[0]), second(xs[1])]
    assert torch.allclose(xs[0], xs[1].flip(0), atol=1e-5)


def test_slices_of_the_blocks_stay_lean_blocks(tiny_vit):
    part = leanvit.slim(tiny_vit, leanvit.GLAD(at=(1,))).blocks[:3]
    assert isinstance(part, LeanBlocks) and len(part) == 3 and part.grid == (4, 4)


def test_a_copy_is_independent(tiny_vit):
    lean = leanvit.slim(tiny_vit, leanvit.DGSSA(layers=(0,)))
    other = copy.deepcopy(lean)
    with torch.no_grad():
        other.blocks[0].attn.logits.add_(torch.randn_like(other.blocks[0].attn.logits))
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(lean(images), other(images))


def test_other_models_are_refused_by_name():
    with pytest.raises(leanvit.UnsupportedModelError, match="ResNet is not supported; timm's VisionTransformer"):
        leanvit.slim(timm.create_model("resnet10t"))
    with pytest.raises(leanvit.UnsupportedModelError, match="Linear is not supported"):
        leanvit.slim(nn.Linear(2, 2))


def test_other_blocks_are_refused_by_name():
    with pytest.raises(leanvit.UnsupportedModelError, match="block 0 is a ResPostBlock"):
        leanvit.slim(small_vit(block_fn=ResPostBlock, init_values=1e-5))
    with pytest.raises(leanvit.UnsupportedModelError, match="block 0 uses DiffAttention"):
        leanvit.slim(small_vit(attn_layer="diff", num_heads=2))


def test_a_lean_model_is_not_slimmed_again(tiny_vit):
    with pytest.raises(leanvit.UnsupportedModelError, match="all methods at once"):
        leanvit.slim(leanvit.slim(tiny_vit))


def test_patches_of_a_backbone_are_refused():
    with pytest.raises(leanvit.UnsupportedModelError, match="HybridEmbed is not supported"):
        leanvit.slim(timm.create_model("vit_tiny_r_s16_p8_224", img_size=64))


def test_patch_dropout_is_refused():
    with pytest.raises(leanvit.UnsupportedModelError, match="patch_drop_rate=0"):
        leanvit.slim(small_vit(patch_drop_rate=0.5))


def test_attention_masks_are_refused(tiny_vit):
    lean = leanvit.slim(tiny_vit)
    images = torch.randn(1, 3, 32, 32)
    for call in (lean, lean.forward_features, lean.forward_intermediates):
        with pytest.raises(leanvit.InputSizeError, match="no attention mask"):
            call(images, attn_mask=torch.zeros(17, 17))


def test_only_lean_models_deploy_and_restore(tiny_vit):
    with pytest.raises(leanvit.DeployError, match="slim\\(\\) makes one"):
        leanvit.deploy(tiny_vit)
    with pytest.raises(leanvit.RestoreError, match="slim\\(\\) makes one"):
        leanvit.restore(tiny_vit)


def test_deploying_twice_changes_nothing(tiny_vit):
    fast = leanvit.deploy(leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,))))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(leanvit.deploy(fast)(images), fast(images))


def test_tokens_that_were_not_tracked_say_so(tiny_vit):
    tokens = leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,))).forward_tokens(torch.randn(1, 3, 32, 32))
    with pytest.raises(leanvit.MethodError, match="track=True"):
        tokens.expand()


def test_print_shows_methods_and_blocks(tiny_vit):
    text = repr(leanvit.slim(tiny_vit, leanvit.DGSSA(layers=(0,)), leanvit.GLAD(at=(2,))))
    assert re.search(r"method=dgssa:layers=0\+glad:at=2, deployed=False", text)
    assert "(0): static attention, 3 heads of 17×17" in text and "(2): glad 16→8 tokens, dense" in text


def test_a_deployed_model_keeps_its_layout_when_loaded(tiny_vit, tmp_path):
    """What is timed is what ships: the weights' order in memory is part of the deployed form."""
    fast = leanvit.deploy(leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,))))
    leanvit.save(fast, tmp_path / "fast")
    strides = [parameter.stride() for parameter in fast.parameters()]
    assert [parameter.stride() for parameter in leanvit.load(tmp_path / "fast").parameters()] == strides


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_linear_layers_of_other_kinds_stay_as_they_are(part, tiny_vit):
    class Other(nn.Linear):
        pass

    for block in tiny_vit.blocks:
        getattr(block.mlp, part).__class__ = Other
    x = photos(tiny_vit, 2)
    with torch.inference_mode():
        expected = tiny_vit(x)
        assert (leanvit.deploy(leanvit.slim(tiny_vit))(x) - expected).abs().max() < 1e-5


@pytest.mark.skipif(not prefers_onednn(torch.bfloat16), reason="this CPU has no bf16 products to keep blocks for")
def test_a_deployed_model_keeps_no_blocks_of_another_type(tiny_vit):
    fast = leanvit.deploy(leanvit.slim(tiny_vit)).bfloat16()
    with torch.inference_mode():
        fast(torch.randn(1, 3, 32, 32).bfloat16())
    assert blocks_of(fast.parameters())
    assert set(fast.state_dict()) == set(tiny_vit.state_dict())
    assert not blocks_of(copy.deepcopy(fast).parameters())
    assert not blocks_of(fast.float().parameters())


def test_a_size_that_patches_do_not_divide_is_refused_before_anything_changes(tiny_vit):
    lean = leanvit.slim(tiny_vit, leanvit.Castling(layers=(0,), kernel=3))
    state = {key: value.shape for key, value in lean.state_dict().items()}
    with pytest.raises(leanvit.InputSizeError, match="45×45 does not divide into patches of 8×8"):
        lean.set_input_size(45)
    with pytest.raises(leanvit.MethodError, match="larger than the patch grid of 2×2"):
        lean.set_input_size(16)
    assert {key: value.shape for key, value in lean.state_dict().items()} == state


def test_parameters_of_the_methods_can_go_without_weight_decay(tiny_vit):
    lean = leanvit.slim(tiny_vit, leanvit.DGSSA(layers=(0,)), leanvit.GLAD(at=(2,)))
    assert {"blocks.0.attn.logits", "blocks.2.stages.glad.bias", "pos_embed"} <= lean.no_weight_decay()
