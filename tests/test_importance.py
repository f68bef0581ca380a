"""AdaViT's warm start: what decisions are worth, measured by gradients, and decisions that predict it."""

from __future__ import annotations

import pytest
import torch

import leanvit
from leanvit.importance import GatedDecisions, _Fit, _importance, _level
from leanvit.methods import parse
from leanvit.methods.adavit import DecisionLayer

from .contract import MODELS, photos, small_vit


def warm(vit, method, count=96):
    lean = leanvit.slim(vit, *parse(method))
    leanvit.warm_start(lean, vit, photos(vit, count), steps=0, progress=False)
    return lean


def usage(lean, images):
    with leanvit.record("patch_usage", "head_usage", "sublayer_usage") as found, torch.no_grad():
        lean(images)
    return [
        float(torch.stack([one.value.mean() for one in found[kind]]).mean())
        for kind in ("patch_usage", "head_usage", "sublayer_usage")
    ]


@pytest.mark.parametrize("model", ["class token", "average pooling", "registers", "attention pooling"])
def test_importance_is_the_squared_gradient_of_each_gate(model, monkeypatch):
    """Against differences: each gate a little lower, the change of the same projection of the features."""
    monkeypatch.setattr("leanvit.importance.DRAWS", 1)
    lean = leanvit.slim(small_vit(**MODELS[model]), leanvit.AdaViT()).double()
    images = photos(lean, 2).double()
    deciding = [block.decide for block in lean.blocks[1:]]
    for decide in deciding:
        decide.__class__ = GatedDecisions
    x = lean.norm_pre(lean._pos_embed(lean.patch_embed(images)))
    found = _importance(lean, deciding, x, torch.Generator().manual_seed(0))

    def projected():
        features = lean.forward_head(lean.norm(lean.blocks(x)), pre_logits=True)
        direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        return float((features * direction).sum().detach())

    step = 1e-3  # attention weights are computed in fp32
    for block, kind, place in ((0, 0, 3), (1, 0, 15), (2, 1, 1), (0, 2, 0), (2, 2, 1)):
        changed = Lowered(kind, place, step)
        values = []
        for by in (step, -step):
            changed.by = by
            with changed.of(deciding[block]):
                values.append(projected())
        slope = (values[1] - values[0]) / (2 * step)
        assert float(found[block][kind][0, place]) == pytest.approx(slope**2, rel=0.03, abs=1e-6)


class Lowered:
    """A gate of the first image lowered by a little, while open."""

    def __init__(self, kind, place, by):
        self.kind, self.place, self.by = kind, place, by

    def of(self, decide):
        self.decide, self.draw = decide, decide.draw
        return self

    def __enter__(self):
        def draw(x, prefix):
            gates = [gate.detach().clone() for gate in self.draw(x, prefix)]
            gates[self.kind][0, self.place] -= self.by
            return tuple(gates)

        self.decide.draw = draw

    def __exit__(self, *_):
        del self.decide.draw


def test_least_squares_finds_a_linear_rule():
    torch.manual_seed(0)
    layer = DecisionLayer(8, 3)
    fit = _Fit(layer, slice(1, 3))
    rule, offset = torch.randn(8, 2), torch.randn(2)
    for _ in range(20):
        seen = torch.randn(4, 50, 8)
        fit.add(seen, (seen @ rule + offset).exp())
    weight, mean, std = fit.solve()
    # A floor keeps the logarithm finite and bends the rule a little where importance is least.
    assert torch.allclose(weight.float(), rule, atol=0.1)
    assert torch.allclose(std.float(), rule.norm(dim=0), rtol=0.1)
    assert torch.allclose(mean.float(), offset, atol=0.2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_level_that_a_share_lies_above(share):
    torch.manual_seed(0)
    mean, std = torch.randn(5), torch.rand(5) * 3
    level = _level(mean, std, share)
    assert float((mean + std * torch.randn(100_000, 5) > level).float().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("model", ["class token", "average pooling", "registers"])
def test_a_warm_start_brings_usage_to_the_targets(model):
    vit = small_vit(**MODELS[model])
    patches, heads, sublayers = usage(warm(vit, "adavit:patches=0.6,heads=0.8,blocks=0.8"), photos(vit, 96))
    assert patches == pytest.approx(0.6, abs=0.12) and heads == pytest.approx(0.8, abs=0.12)
    assert sublayers == pytest.approx(0.8, abs=0.12)


def test_after_a_warm_start_training_aims_at_the_budget_from_its_first_step():
    vit = small_vit()
    method = leanvit.AdaViT(patches=0.6, heads=1, blocks=1)
    lean = warm(vit, str(method))
    for progress in (0, 0.3, 1):
        method.set_progress(lean, progress)
        with leanvit.record("usage_target") as found:
            lean(photos(vit))
        assert found["usage_target"][0].value.tolist() == pytest.approx([0.6, 1, 1])


@pytest.mark.parametrize("model", ["class token", "average pooling"])
@torch.no_grad()
def test_fitted_decisions_keep_what_matters(model):
    """On other images than they were fitted to: nearer to the dense outputs than with every decision the other way."""
    vit = small_vit(**MODELS[model])
    every = photos(vit, 192)
    lean = warm(vit, "adavit:patches=0.5,heads=1,blocks=1", 96)
    images = every[96:]
    dense, fitted = vit(images), lean(images)
    for block in lean.blocks[1:]:
        block.decide.patch.weight.neg_()
        block.decide.patch.bias.neg_()
    assert (fitted - dense).square().mean() < 0.8 * (lean(images) - dense).square().mean()


def test_what_is_not_decided_is_left_alone():
    vit = small_vit()
    lean = warm(vit, "dgssa:layers=0+adavit:first=2,heads=1,patches=1")
    assert lean.blocks[2].decide.patch is None and lean.blocks[2].decide.image.weight.shape == (2, 48)
    patches, heads, sublayers = usage(lean, photos(vit, 96))
    assert (patches, heads) == (1, 1) and sublayers == pytest.approx(0.65, abs=0.15)


def test_decisions_of_what_is_alike_in_every_image():
    """In front of block 0 the class token always is."""
    vit = small_vit()
    lean = warm(vit, "adavit:patches=0.5,heads=0.5,blocks=0.6,first=0", 16)
    assert all(bool(weight.isfinite().all()) for weight in lean.state_dict().values())
