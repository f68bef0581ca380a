"""AdaViT: decisions, budgets, real skipping, and what each image costs."""

from __future__ import annotations

import math

import pytest
import torch

import leanvit
from leanvit.count import constant_macs, image_macs
from leanvit.methods import parse
from leanvit.methods.adavit import Decisions, RandomDecisions
from leanvit.ops import packed
from leanvit.ops.packed import packed_attention, packed_attention_reference, packed_rows, rounded_up
from leanvit.packed import ranges

from .contract import MODELS, photos, small_vit

USAGES = {
    "mixed": (0.5, 0.5, 0.5),
    "few": (0.1, 0.3, 0.7),
    "no patch but the class token": (0.0, 0.7, 0.7),
    "no head": (0.7, 0.0, 1.0),
    "no block": (0.7, 0.7, 0.0),
    "all": (1.0, 1.0, 1.0),
}


def drawn(usage: tuple[float, float, float], model: str = "class token", **settings):
    """A lean model and its deployed form that draw the same random policies, and a way to begin the draws anew."""
    lean = leanvit.slim(small_vit(**MODELS[model]), leanvit.AdaViT(**settings))
    fast = leanvit.deploy(lean)
    generator = torch.Generator()
    for each in (lean, fast):
        for module in each.modules():
            if isinstance(module, Decisions):
                RandomDecisions.adopt(module, usage, generator)
    return lean, fast, generator


@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES)
@pytest.mark.parametrize("model", ["class token", "average pooling", "registers", "scaled norms, gate"])
@pytest.mark.parametrize("partial", [False, True])
@torch.no_grad()
def test_skipping_equals_masking_for_any_policies(usage, model, partial):
    lean, fast, generator = drawn(usage, model, partial=partial)
    for seed, batch in enumerate((1, 1, 7)):
        images = photos(lean, batch)
        generator.manual_seed(seed)
        masked = lean(images)
        generator.manual_seed(seed)
        assert (fast(images) - masked).abs().max() < 1e-4


@pytest.mark.parametrize("usage", [USAGES["mixed"], USAGES["all"]])
@pytest.mark.parametrize("model", ["average pooling", "registers", "scaled norms, gate"])
@pytest.mark.parametrize("partial", [False, True])
@torch.no_grad()
def test_macs_of_an_image_are_those_of_the_operations_that_run(usage, model, partial, monkeypatch):
    monkeypatch.setattr("leanvit.packed.rounded_up", lambda rows: rows)
    _, fast, generator = drawn(usage, model, partial=partial)
    constant = constant_macs(fast)
    for seed in range(3):
        image = photos(fast, 1)
        generator.manual_seed(seed)
        with leanvit.record("macs") as found:
            fast(image)
        generator.manual_seed(seed)
        assert image_macs(found, constant).tolist() == [leanvit.count(fast, images=image).macs]


def test_rows_that_belong_to_no_image_give_no_gradient():
    _, fast, _ = drawn(USAGES["mixed"])
    images = photos(fast, 5).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        (gradient,) = torch.autograd.grad(fast(images).sum(), images)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 8, 100, 197, 1000, 6304])
def test_few_rows_are_added(rows):
    assert rows <= rounded_up(rows) <= max(rows * 17 / 16, rows + 7)


def test_rows_of_active_tokens():
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    assert packed_rows(keep, [0, 1, 2]).tolist() == [0, 2, 6, 7, 8]
    assert packed_rows(keep, [2, 0]).tolist() == [6, 7, 8, 0, 2]
    assert packed_rows(keep, [1]).tolist() == []
    assert ranges((0, 1, 3)) == [range(2), range(3, 4)] and ranges(()) == []


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3, 9], [1, 40, 40, 7], [130, 130]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_packed_attention(lengths, dtype, tolerance):
    total = sum(lengths)
    q, k, v = torch.randn(3, total + 3, 2, 16).to(dtype)  # three rows belong to no image
    got = packed_attention(q, k, v, lengths)[:total]
    want = packed_attention_reference(*(x[:total].double() for x in (q, k, v)), lengths)
    assert (got - want).abs().max() < tolerance


def test_variable_length_attention_of_torch_is_found_where_it_exists():
    """It runs on GPUs only; here it must at least take the arguments it is given."""
    if packed.varlen_attn is None:
        pytest.skip("not in this torch")
    from inspect import signature

    signature(packed.varlen_attn).bind(*(torch.empty(0),) * 3, torch.empty(0), torch.empty(0), 1, 1)


def test_a_dropped_patch_keeps_its_value_and_may_come_back():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.AdaViT(heads=1, blocks=1))
    with torch.no_grad():
        lean.blocks[1].decide.patch.bias.fill_(-100)
    x = torch.randn(2, 17, 48)
    tokens = lean.blocks.tokens(x)
    out = lean.blocks[1](tokens)
    assert torch.equal(out.x[:, 1:], x[:, 1:]) and not torch.allclose(out.x[:, 0], x[:, 0])
    assert not torch.allclose(lean.blocks[2](out).x[:, 1:], x[:, 1:])


def test_training_draws_and_sends_gradients_to_every_decision():
    lean = leanvit.slim(small_vit(), leanvit.AdaViT()).train()
    with leanvit.record(*leanvit.AdaViT.loss_kinds) as found:
        lean(photos(lean, 32)).square().sum().backward()
    for kind in ("patch_usage", "head_usage", "sublayer_usage"):
        for one in found[kind]:
            assert one.value.unique().numel() <= 3 and one.value.requires_grad  # 0 and 1, to rounding
    for block in lean.blocks[1:]:
        assert block.decide.patch.weight.grad.abs().sum() > 0 and block.decide.image.weight.grad.abs().sum(1).min() > 0


def test_targets_move_from_everything_to_the_budget():
    method = leanvit.AdaViT(patches=0.6, heads=0.8, blocks=1, ramp=0.5)
    lean = leanvit.slim(small_vit(), method)
    losses = []
    for progress, target in ((0, (1, 1, 1)), (0.25, (0.8, 0.9, 1)), (0.5, (0.6, 0.8, 1)), (1, (0.6, 0.8, 1))):
        method.set_progress(lean, progress)
        with leanvit.record() as found:
            lean(photos(lean))
        assert torch.allclose(found["usage_target"][0].value, torch.tensor(target).float())
        losses.append(float(method.losses(found)["usage"]))
    assert losses == pytest.approx([0, 0.6, 1.2, 1.2])  # all is on: twice the distance to the targets


@torch.no_grad()
def test_heads_count_only_where_their_attention_runs():
    method = leanvit.AdaViT(patches=1, usage_weight=1)
    lean = leanvit.slim(small_vit(), method)
    method.set_progress(lean, 1)
    for index, block in enumerate(lean.blocks[1:]):
        weight, bias = block.decide.image.weight, block.decide.image.bias
        weight.zero_()
        bias.copy_(torch.tensor([1.0, -1, -1, 1, 1] if index == 0 else [1.0, 1, 1, -1, 1]))
    with leanvit.record() as found:
        lean(photos(lean))
    assert float(method.losses(found)["usage"]) == pytest.approx(abs(1 / 3 - 0.7) + abs(4 / 6 - 0.65), abs=1e-5)


# ---- budgets


def spread(lean):
    """Decisions that differ between images, without training."""
    torch.manual_seed(0)
    for block in lean.blocks[1:]:
        torch.nn.init.normal_(block.decide.patch.weight)
        torch.nn.init.normal_(block.decide.image.weight)
    return lean


@pytest.mark.parametrize("macs", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_a_budget_is_met(macs, deployed, tmp_path):
    vit = small_vit()
    images = photos(vit, 96)
    lean = spread(leanvit.slim(vit, leanvit.AdaViT()))
    model = leanvit.deploy(lean) if deployed else lean
    reached = leanvit.set_budget(model, macs, images[::2])
    assert reached == pytest.approx(macs, rel=0.02)
    cost = leanvit.count(model, images=images[::2]).macs / leanvit.count(vit).macs
    assert cost == pytest.approx(macs, rel=0.05)  # the rows that products are rounded up to included
    leanvit.save(model, tmp_path / "model")
    assert torch.equal(leanvit.load(tmp_path / "model")(images), model(images))


@torch.no_grad()
def test_a_budget_that_no_threshold_reaches():
    vit = small_vit()
    lean = spread(leanvit.slim(vit, leanvit.AdaViT()))
    before = lean.blocks[1].decide.threshold.clone()
    for macs in (0.1, 1.2):
        reachable = rf"no threshold gives a budget of {macs}: they reach 0\.3\d\d to 1\.0"
        with pytest.raises(leanvit.ConfigError, match=reachable):
            leanvit.set_budget(lean, macs, photos(vit, 16))
    assert lean.blocks[1].decide.threshold == before
    for block in lean.blocks[1:]:  # all images decided alike: nothing between all and nothing
        torch.nn.init.zeros_(block.decide.patch.weight)
        torch.nn.init.zeros_(block.decide.image.weight)
    with pytest.raises(leanvit.ConfigError, match="the nearest give"):
        leanvit.set_budget(lean, 0.6, photos(vit, 16))


def test_a_budget_that_needs_everything_has_a_threshold_that_can_be_trained_on():
    lean = spread(leanvit.slim(small_vit(), leanvit.AdaViT()))
    share = leanvit.set_budget(lean, 1.0, photos(lean, 8))
    assert share == pytest.approx(1, rel=0.02) and abs(float(lean.blocks[1].decide.threshold)) < 100


@torch.no_grad()
def test_deployed_under_autocast_with_a_norm_behind_the_attention():
    vit = small_vit(**MODELS["scaled norms, gate"])
    fast = leanvit.deploy(spread(leanvit.slim(vit, leanvit.AdaViT())))
    images = photos(vit, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(images).isfinite().all()


@pytest.mark.parametrize("macs", [0, -0.5, math.nan, "half", True])
def test_a_budget_that_is_no_share(macs):
    with pytest.raises(leanvit.ConfigError, match=r"macs=.* is not a share"):
        leanvit.set_budget(leanvit.slim(small_vit(), leanvit.AdaViT()), macs, torch.randn(2, 3, 32, 32))


def test_a_model_without_decisions_has_no_budget():
    for model in (small_vit(), leanvit.slim(small_vit(), leanvit.GLAD(at=2))):
        with pytest.raises(leanvit.UnsupportedModelError, match="decides nothing per image"):
            leanvit.set_budget(model, 0.5, torch.randn(2, 3, 32, 32))


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches": 0}, r"patches=0 is not in \(0, 1\]"),
        ({"heads": 1.2}, r"heads=1\.2 is not in \(0, 1\]"),
        ({"blocks": -0.5}, r"blocks=-0\.5 is not in \(0, 1\]"),
        ({"patches": "all"}, r"patches='all' is not in \(0, 1\]"),
        ({"patches": 1, "heads": None, "blocks": 1.0}, "nothing is left to decide"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
        ({"temperature": math.inf}, "temperature=inf must be a number of at least 0"),
        ({"usage_weight": -1}, "usage_weight=-1 must be a number of at least 0"),
        ({"ramp": 2}, r"ramp=2 is a share of training, in \[0, 1\]"),
        ({"first": -1}, "first=-1 must be the index of a block"),
        ({"partial": "half"}, "partial='half' must be true or false"),
    ],
)
def test_bad_parameters(settings, message):
    with pytest.raises(leanvit.ConfigError, match=message):
        leanvit.AdaViT(**settings)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([leanvit.AdaViT(), leanvit.GLAD(at=2)], "adavit: block 2 decides for each image .* glad fixes that"),
        ([leanvit.DGSSA(layers=(0, 2)), leanvit.AdaViT()], "adavit: block 2 decides over dense attention .* dgssa"),
        ([leanvit.AdaViT(first=4)], "adavit: block 4 does not exist"),
    ],
)
def test_methods_that_do_not_go_together(methods, message):
    with pytest.raises(leanvit.MethodError, match=message):
        leanvit.slim(small_vit(), *methods)


@pytest.mark.parametrize("before", ["merging:r=4,0,0,0", "pruning:at=0,keep=0.5", "glad:at=1"])
@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_fewer_tokens_in_blocks_before(before, batch):
    lean = leanvit.slim(small_vit(), *parse(f"{before}+adavit:first=2"))
    fast = leanvit.deploy(lean)
    generator = torch.Generator()
    for each in (lean, fast):
        for module in each.modules():
            if isinstance(module, Decisions):
                RandomDecisions.adopt(module, USAGES["mixed"], generator)
    images = photos(lean, batch)
    generator.manual_seed(0)
    masked = lean(images)
    generator.manual_seed(0)
    assert (fast(images) - masked).abs().max() < 1e-4
