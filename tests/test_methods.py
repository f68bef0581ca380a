"""Parameters of the methods: read, checked, resolved; DGSSA's guidance and GLAD's pooling."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import leanvit
from leanvit.methods import Method, available, from_config, parse, register
from leanvit.methods.dgssa import guidance_loss
from leanvit.methods.glad import place_stages

from .contract import photos, small_vit


def test_no_layers_at_all():
    with pytest.raises(leanvit.ConfigError, match="layers is empty"):
        leanvit.DGSSA(layers=())


@pytest.mark.parametrize("method", ["glad", leanvit.GLAD])
def test_what_is_no_method_is_refused(method, tiny_vit):
    with pytest.raises(leanvit.ConfigError, match=r"is no method; give one such as leanvit\.GLAD\(\)"):
        leanvit.slim(tiny_vit, method)


def test_measured_parameters_need_images(tiny_vit):
    with pytest.raises(leanvit.ConfigError, match="'auto', which is measured: give images"):
        leanvit.slim(tiny_vit, leanvit.DGSSA(layers="auto:2"))


def test_text_and_python_give_the_same():
    expected = (leanvit.DGSSA(layers="auto:4", guidance=0.25), leanvit.GLAD(at=(6, 8, 10), keep=0.5))
    assert parse("dgssa:layers=auto:4,guidance=0.25+glad:at=6,8,10,keep=0.5") == expected
    assert parse("dgssa:layers=0-2,5") == (leanvit.DGSSA(layers=(0, 1, 2, 5)),)
    assert parse("dgssa:layers=1-3") == (leanvit.DGSSA(layers=(1, 2, 3)),)
    assert parse("glad:at=6") == (leanvit.GLAD(at=6),) == (leanvit.GLAD(at=[6]),)


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(leanvit.ConfigError, match="unknown method 'x'"):
        from_config({"name": "x"})
    with pytest.raises(leanvit.ConfigError, match="no parameter 'beta'"):
        from_config({"name": "glad", "beta": 1})


def test_names_are_given_once():
    @dataclasses.dataclass(frozen=True)
    class Other(Method):
        name = "glad"

    with pytest.raises(leanvit.ConfigError, match="'glad' is registered already: GLAD"):
        register(Other)
    assert available()["glad"] is leanvit.GLAD


def test_every_default_is_applied_with_images():
    vit = small_vit()
    for cls in available().values():
        assert leanvit.slim(vit, cls(), images=photos(vit)).lean.methods[0].name == cls.name


def test_dgssa_picks_the_layers_that_vary_least():
    vit = small_vit()
    images = photos(vit, 16)
    ranked = sorted(leanvit.attention_statistics(vit, images), key=lambda layer: layer.relative_variance)
    lean = leanvit.slim(vit, leanvit.DGSSA(layers="auto:2"), images=images)
    assert lean.lean.methods[0].layers == tuple(sorted(layer.index for layer in ranked[:2]))


def test_dgssa_starts_as_the_mean_attention():
    vit = small_vit()
    images = photos(vit, 8)
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(1,)))
    leanvit.warm_start(lean, vit, images, steps=0, progress=False)
    x = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
    mean = leanvit.analysis.attention_map(vit.blocks[1].attn, vit.blocks[1].norm1(x)).mean(0)
    assert torch.allclose(lean.blocks[1].attn.static, mean, atol=1e-5)


def test_dgssa_hands_over_from_dynamic_to_static():
    vit = small_vit()
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0, 1), guidance=0.5))
    method = lean.lean.methods[0]
    static = lean(images)
    method.set_progress(lean, 0.0)
    assert torch.allclose(lean(images), vit(images), atol=1e-5)  # all dynamic: the dense model
    with pytest.raises(leanvit.DeployError, match="block 0 is not ready to deploy: guidance is not over, 100%"):
        leanvit.deploy(lean)
    leanvit.deploy(lean, force=True)
    method.set_progress(lean, 0.25)
    assert float(lean.blocks[1].attn.alpha) == pytest.approx(0.5)
    method.set_progress(lean, 0.5)
    assert torch.equal(lean(images), static)


def test_dgssa_guidance_loss_is_the_divergence_and_vanishes_at_the_mean():
    vit = small_vit()
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0, 1), guidance_weight=2.0))
    method = lean.lean.methods[0]
    with leanvit.record("guidance") as found:
        lean(images)
    assert method.losses(found) == {}  # all static: nothing to guide
    method.set_progress(lean, 0.1)
    with leanvit.record("guidance") as found:
        lean(images)
    loss = method.losses(found)["guidance"]
    assert [record.layer for record in found["guidance"]] == [0, 1]
    assert loss.detach() == pytest.approx(2 * sum(float(r.value.detach()) for r in found["guidance"]) / 2)
    loss.backward()
    assert lean.blocks[0].attn.logits.grad.abs().sum() > 0
    dynamic = torch.rand(4, 2, 5, 5).softmax(-1)
    assert guidance_loss(dynamic, dynamic.mean(0)).abs() < 1e-6
    by_hand = (dynamic.mean(0) * (dynamic.mean(0) / 0.2).log()).sum(-1).mean()
    assert torch.allclose(guidance_loss(dynamic, torch.full((2, 5, 5), 0.2)), by_hand)


def test_static_query_and_key_are_not_computed():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0,)))
    rows = lean.blocks[0].attn.qkv.weight
    with torch.no_grad():
        rows[: 2 * vit.embed_dim].fill_(float("nan"))
    assert lean(photos(vit)).isfinite().all()


def test_glad_starts_as_local_pooling():
    vit = small_vit()
    stage = leanvit.slim(vit, leanvit.GLAD(at=(1,))).blocks[1].stages["glad"]
    x = torch.randn(2, 17, vit.embed_dim)
    tokens = stage(leanvit.Tokens(x, 1, (4, 4)))
    cells = torch.stack([x[:, 1:][:, stage.cells == cell].mean(1) for cell in range(stage.count)], 1)
    assert tokens.x.shape == (2, 9, vit.embed_dim) and torch.equal(tokens.x[:, :1], x[:, :1])
    assert (tokens.x[:, 1:] - cells).abs().max() < 0.2


def test_glad_default_places_three_stages():
    vit = small_vit(depth=12)
    assert leanvit.slim(vit, leanvit.GLAD()).lean.methods[0].at == (6, 8, 10)


def test_glad_stages_go_where_attention_needs_no_more_tokens():
    assert place_stages([90, 60, 30, 40, 20, 10], [0.5, 0.5], 100) == (2, 4)
    with pytest.raises(
        leanvit.MethodError, match="no place for stage 2 of 2: 25 tokens would be fewer than the effective rank"
    ):
        place_stages([90, 60, 30, 40], [0.5, 0.5], 100)


def test_resizing_untrained_glad_is_pooling_on_the_new_grid():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.GLAD(at=(1, 2)))
    lean.set_input_size((48, 48))
    fresh = small_vit()
    fresh.set_input_size((48, 48))
    images = photos(fresh)
    assert torch.allclose(lean(images), leanvit.slim(fresh, leanvit.GLAD(at=(1, 2)))(images), atol=1e-5)


def resized(size, layers=(1,)):
    """A warm-started static model of a 4×4 grid, at another size."""
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=layers))
    leanvit.warm_start(lean, vit, photos(vit, 16), steps=2, batch_size=8, progress=False)
    lean.set_input_size(size)
    return lean.eval(), photos(lean, 3)


@pytest.mark.parametrize("size", [(64, 64), (48, 72), (24, 24), (32, 32)])
@torch.no_grad()
def test_a_resized_static_layer_is_the_interpolated_one(size):
    lean, images = resized(size)
    attention = lean.blocks[1].attn
    tokens = 1 + size[0] * size[1] // 64
    assert attention.learned.shape[-1] == 17 and attention.static.shape[-1] == tokens
    full = copy.deepcopy(lean)
    full.blocks[1].attn.logits = torch.nn.Parameter(attention.static.log())  # the whole matrix
    full.blocks[1].attn._lay_out(lean.blocks.grid, lean.blocks.grid)
    assert torch.allclose(lean(images), full(images), atol=1e-5)
    fast = leanvit.deploy(lean)
    assert torch.allclose(fast(images), lean(images), atol=1e-5)
    assert fast.blocks[1].attn.static.shape[-1] == min(17, tokens)  # never more than either grid needs
    with leanvit.record("static_attention") as found:
        fast(images)
    assert torch.allclose(found["static_attention"][0].value, attention.static, atol=1e-6)


@torch.no_grad()
def test_a_static_layer_that_is_resized_back_is_what_it_was():
    lean, _ = resized((32, 32))
    before = lean.blocks[1].attn.static
    lean.set_input_size((64, 48))
    lean.set_input_size((32, 32))
    assert torch.equal(lean.blocks[1].attn.static, before)
    assert str(lean.lean) == "dgssa:layers=1,grid=4,4"


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_a_resized_static_model_is_saved_with_the_grid_of_its_matrices(deployed, tmp_path):
    lean, images = resized((64, 48))
    model = leanvit.deploy(lean) if deployed else lean
    again = leanvit.load(leanvit.save(model, tmp_path / "resized")).eval()
    assert torch.allclose(again(images), lean(images), atol=1e-5)


def test_static_matrices_on_a_coarse_grid_cost_less_and_train():
    vit = small_vit(img_size=64)
    lean = leanvit.slim(vit, *parse("dgssa:layers=0,1,grid=4"))
    images = photos(vit, 16)
    leanvit.warm_start(lean, vit, images, steps=0, progress=False)
    kept, full = leanvit.DGSSA(layers=(0, 1), grid=(4, 4)), leanvit.DGSSA(layers=(0, 1))
    assert lean.lean.methods == (kept,)
    assert leanvit.count(lean).macs < leanvit.count(leanvit.slim(vit, full)).macs
    assert torch.allclose(copy.deepcopy(leanvit.deploy(lean))(images), lean(images), atol=1e-5)
    lean.blocks[0].attn.set_progress(0.2)
    lean.train()(images).sum().backward()
    assert lean.blocks[0].attn.logits.grad.abs().sum() > 0


@torch.no_grad()
def test_static_matrices_on_a_grid_finer_than_the_tokens_stay_finite():
    vit = small_vit()
    lean = leanvit.slim(vit, *parse("dgssa:layers=0,grid=14"))
    images = photos(vit, 8)
    leanvit.warm_start(lean, vit, images, steps=0, progress=False)
    usual = leanvit.slim(vit, *parse("dgssa:layers=0"))
    leanvit.warm_start(usual, vit, images, steps=0, progress=False)
    assert (lean(images) - usual(images)).std() < 0.5 * lean(images).std()  # 14 is no multiple of 4: not the same


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_coarse_grid_runs_in_the_type_it_was_saved_in(deployed, dtype, tmp_path):
    lean = leanvit.slim(small_vit(img_size=64), *parse("dgssa:layers=0,1,grid=4"))
    model = (leanvit.deploy(lean) if deployed else lean).to(dtype)
    images = torch.randn(2, 3, 64, 64).to(dtype)
    assert torch.equal(leanvit.load(leanvit.save(model, tmp_path / "x")).eval()(images), model(images))


@pytest.mark.parametrize(("width", "heads", "depth"), [(48, 3, 4), (96, 4, 6)])
def test_macs_equal_the_formulas(width, heads, depth):
    """A static block costs 2·N·C² + N²·C, a stage of GLAD 2·N·C·M, the MLP 8·N·C²."""
    vit = small_vit(embed_dim=width, num_heads=heads, depth=depth)
    lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0, 1)), leanvit.GLAD(at=(2, 3)))

    def mlp(tokens):
        return 8 * tokens * width**2

    def dense(tokens):
        return 4 * tokens * width**2 + 2 * tokens**2 * width + mlp(tokens)

    static = 2 * 17 * width**2 + 17**2 * width + mlp(17)
    stages = 2 * 16 * width * 8 + 2 * 8 * width * 4
    ends = 16 * (3 * 8 * 8) * width + width * 10  # patch embedding and head
    expected = 2 * static + stages + dense(9) + (depth - 3) * dense(5) + ends
    assert leanvit.count(lean).macs == pytest.approx(expected, rel=1e-3)
