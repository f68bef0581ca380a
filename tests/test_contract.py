"""The whole life of every method, through one contract."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models._features import FeatureGetterNet

import leanvit
from leanvit.methods import available, from_config, parse
from leanvit.model import NEEDS

from .contract import CASES, METHODS, SIZE, Case, photos, small_vit

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_method = pytest.mark.parametrize("case", [Case(method) for method in METHODS], ids=str)


def warm(case: Case):
    """The case's dense model, its images, and the lean model after a short warm start, every parameter moved."""
    vit = case.vit()
    images = photos(vit)
    lean = leanvit.slim(vit, *case.methods(), images=images)
    leanvit.warm_start(lean, vit, images, steps=2, batch_size=3, progress=False)
    with torch.no_grad():
        for name, parameter in lean.named_parameters():
            if name in lean.new_parameter_names():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return vit, images, case.at_work(lean)


def test_every_method_has_a_case():
    named = {method.name for text in METHODS for method in parse(text)}
    assert named == set(available())


@each_case
def test_slim_changes_the_outputs_and_leaves_the_model_alone(case):
    vit = case.vit()
    images, before = photos(vit), copy.deepcopy(vit.state_dict())
    lean = leanvit.slim(vit, *case.methods(), images=images)
    difference = (lean(images) - vit(images)).abs().max()
    assert difference < 1e-4 if case.starts_dense else not difference < 1e-3
    lean = case.at_work(lean)
    assert type(lean.blocks).__name__ == "LeanBlocks" and not (lean(images) - vit(images)).abs().max() < 1e-3
    assert vit.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@each_case
def test_inherited_weights_keep_their_names_and_values(case):
    vit = case.vit()
    state = leanvit.slim(vit, *case.methods()).state_dict()
    for key, value in vit.state_dict().items():
        assert torch.equal(state[key], value), key


@each_case
@torch.no_grad()
def test_deployed_equals_trained(case):
    _, images, lean = warm(case)
    fast = leanvit.deploy(lean)
    assert (fast(images) - lean(images)).abs().max() < 1e-4
    assert (fast(images[:1]) - lean(images[:1])).abs().max() < 1e-4
    if not lean.dynamic_img_size:  # there timm's own model refuses an empty batch
        assert fast(images[:0]).shape == lean(images[:0]).shape == (0, lean.num_classes)
    assert fast.lean.deployed and not lean.lean.deployed
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@each_case
@torch.no_grad()
def test_deployed_costs_less(case):
    vit = case.vit(img_size=2 * SIZE)  # attention that is linear in the tokens saves nothing for very few of them
    images = photos(vit)
    lean = case.at_work(leanvit.slim(vit, *case.methods()))
    assert leanvit.count(lean, images=images).macs < leanvit.count(vit).macs


@each_method
def test_every_parameter_gets_a_gradient_at_some_time(case):
    vit = case.vit()
    lean = leanvit.slim(vit, *case.methods())
    lean.train()
    for progress in (0.0, 0.25, 1.0):
        for method in lean.lean.methods:
            method.set_progress(lean, progress)
        with leanvit.record() as found:
            loss = lean(photos(vit)).square().sum()
        (loss + sum(term for method in lean.lean.methods for term in method.losses(found).values())).backward()
    missing = [name for name, parameter in lean.named_parameters() if parameter.grad is None]
    assert not missing


@each_case
@torch.no_grad()
def test_warm_start_is_never_worse(case):
    vit = case.vit()
    images = photos(vit, 24)
    lean = leanvit.slim(vit, *case.methods())
    fits = leanvit.warm_start(lean, vit, images, steps=8, batch_size=4, progress=False)
    assert fits and all(fit.after <= fit.before for fit in fits)
    assert fits[-1].after == pytest.approx(error_behind_the_blocks(lean, vit, images, 4), rel=1e-3, abs=1e-9)
    # Without parameters of its own a method starts so close that 24 images may teach it nothing.
    close = not lean.new_parameter_names() or (case.starts_dense and all(fit.before < 1e-6 for fit in fits))
    assert any(fit.kept for fit in fits) or close


def error_behind_the_blocks(lean, vit, images, held_out):
    """By the warm start's definition, of the model as it is now, on the last images."""
    seen = []
    hooks = [model.blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1])) for model in (lean, vit)]
    lean.forward_tokens(images, track=True), vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    tokens, dense = seen
    prefix, off = tokens.prefix, (tokens.x - tokens.reduce(dense)).square()[-held_out:]
    behind, before = (
        float(part.mean() / whole.flatten(0, 1).var(dim=0).mean()) if part.shape[1] else 0.0
        for part, whole in ((off[:, prefix:], dense[:, prefix:]), (off[:, :prefix], dense[:, :prefix]))
    )
    return 0.3 * before + 0.7 * behind if prefix else behind


@each_case
def test_restore_gives_the_dense_model_back(case):
    vit = case.vit()
    lean = leanvit.slim(vit, *case.methods())
    dense = leanvit.restore(lean)
    assert type(dense) is type(vit) and type(dense.blocks) is type(vit.blocks)
    assert [type(m) for m in dense.modules()] == [type(m) for m in vit.modules()]
    images = photos(vit)
    assert torch.equal(dense(images), vit(images))


@each_method
def test_restore_refuses_changed_weights(case):
    vit = case.vit()
    lean = leanvit.slim(vit, *case.methods())
    with torch.no_grad():
        lean.blocks[1].mlp.fc1.weight.add_(1)
    with pytest.raises(leanvit.RestoreError, match=r"blocks\.1\.mlp\.fc1\.weight was changed"):
        leanvit.restore(lean)
    with pytest.raises(leanvit.RestoreError, match="deployed"):
        leanvit.restore(leanvit.deploy(leanvit.slim(vit, *case.methods())))


@each_case
def test_features_on_the_full_grid(case):
    vit = case.vit()
    images = photos(vit)
    lean = leanvit.slim(vit, *case.methods())
    final, maps = lean.forward_intermediates(images, norm=True)
    dense_final, dense_maps = vit.forward_intermediates(images, norm=True)
    assert final.shape == dense_final.shape
    assert [m.shape for m in maps] == [m.shape for m in dense_maps]
    pruned = FeatureGetterNet(copy.deepcopy(lean), out_indices=(0, 2))
    for got, index in zip(pruned(images), (0, 2), strict=True):
        assert torch.allclose(got, lean.forward_intermediates(images, intermediates_only=True)[index], atol=1e-5)


@each_case
def test_tokens_of_the_dense_model_are_reduced_the_same_way(case):
    vit = case.vit()
    images = photos(vit)
    lean = leanvit.slim(vit, *case.methods())
    tokens = lean.forward_tokens(images, track=True)
    dense = vit.forward_features(images)
    assert tokens.reduce(dense).shape == tokens.x.shape
    assert torch.allclose(tokens.reduce(torch.ones_like(dense)), torch.ones_like(tokens.x), atol=1e-5)
    assert tokens.expand().shape == dense.shape
    assert torch.allclose(lean.forward_head(tokens.x), lean(images), atol=1e-5)


@each_case
@torch.no_grad()
def test_another_input_size(case):
    if "dynamic" in case.model:
        pytest.skip("resized by its input")
    _, _, lean = warm(case)
    lean.set_input_size((48, 64))
    images = photos(lean)
    logits = lean(images)
    assert logits.isfinite().all() and logits.shape == (len(images), 10)
    assert (leanvit.deploy(lean)(images) - logits).abs().max() < 1e-4
    with pytest.raises(leanvit.DeployError, match="resize the lean model"):
        leanvit.deploy(lean).set_input_size((32, 32))


@each_method
def test_a_wrong_image_size_is_refused_unless_positions_do_not_matter(case):
    vit = small_vit(dynamic_img_size=True)
    lean = leanvit.slim(vit, *case.methods())
    if not any(getattr(module, need) for block in lean.blocks for module in block.lean_modules() for need in NEEDS):
        _, maps = lean.forward_intermediates(torch.randn(1, 3, 64, 48))
        assert [map.shape[-2:] for map in maps] == [(8, 6)] * len(maps)
        return
    with pytest.raises(leanvit.InputSizeError, match="set_input_size"):
        lean(torch.randn(1, 3, 64, 64))


@each_method
def test_config_and_text_there_and_back(case):
    for method in leanvit.slim(case.vit(), *case.methods()).lean.methods:
        assert from_config(method.to_config()) == method
        assert parse(str(method)) == (method,)


@each_case
@torch.no_grad()
def test_save_and_load(case, tmp_path):
    _, images, lean = warm(case)
    for model, name in ((lean, "lean"), (leanvit.deploy(lean), "fast")):
        leanvit.save(model, tmp_path / name)
        loaded = leanvit.load(tmp_path / name)
        assert torch.equal(loaded.eval()(images), model.eval()(images))
        assert loaded.lean == model.lean


@each_method
def test_gradient_checkpointing_changes_nothing(case):
    vit = case.vit()
    images = photos(vit)
    gradients = []
    for enable in (False, True):
        lean = leanvit.slim(vit, *case.methods())
        lean.set_grad_checkpointing(enable)
        for method in lean.lean.methods:
            method.set_progress(lean, 0.25)
        with leanvit.record() as found:  # as in training: loss terms are computed on the way
            loss = lean(images).square().sum()
        (loss + sum(term for method in lean.lean.methods for term in method.losses(found).values())).backward()
        gradients.append(lean.blocks[0].mlp.fc1.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@each_method
@torch.no_grad()
def test_exports(case):
    if any(method.data_dependent for method in case.methods()):
        pytest.skip("its cost depends on the image: no fixed graph")
    _, images, lean = warm(case)
    fast = leanvit.deploy(lean)
    program = torch.export.export(fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert (program.module()(images[:3]) - fast(images[:3])).abs().max() < 1e-4


@each_method
@torch.no_grad()
def test_half_precision_stays_close(case):
    _, images, lean = warm(case)
    fast = leanvit.deploy(lean)
    full, half = fast(images), fast.to(torch.bfloat16)(images.to(torch.bfloat16)).float()
    off = (half - full).abs().amax(dim=1) / full.abs().max()
    # What decides by the image may decide otherwise in bf16 where it is close: that is one image, not most.
    assert off.median() < 0.1 if any(method.data_dependent for method in case.methods()) else off.max() < 0.1


@each_method
def test_print_shows_what_changed(case):
    text = repr(leanvit.slim(case.vit(), *case.methods()))
    for method in case.methods():
        assert method.name in text
