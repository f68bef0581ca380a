"""Warm start, the recorder and the measurements it builds on."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leanvit
from leanvit.methods import parse
from leanvit.record import offer

from .contract import photos, small_vit


def lean_and_vit():
    vit = small_vit()
    return leanvit.slim(vit, leanvit.DGSSA(layers=(1,)), leanvit.GLAD(at=(2,))), vit


def test_outputs_come_closer():
    lean, vit = lean_and_vit()
    images = photos(vit, 32)
    before = (lean(images) - vit(images)).square().mean()
    leanvit.warm_start(lean, vit, images, steps=30, batch_size=4, progress=False)
    assert (lean(images) - vit(images)).square().mean() < 0.5 * before


def test_a_block_that_does_not_improve_keeps_its_start():
    lean, vit = lean_and_vit()
    images = photos(vit, 16)
    leanvit.warm_start(lean, vit, images, steps=0, progress=False)
    start = {key: value.clone() for key, value in lean.state_dict().items()}
    fits = leanvit.warm_start(lean, vit, images, steps=3, batch_size=4, lr=1e3, progress=False)
    assert fits and not any(fit.kept for fit in fits)
    assert all(torch.allclose(value, start[key], atol=1e-6) for key, value in lean.state_dict().items())


def test_a_block_that_does_not_improve_is_tried_again_with_smaller_steps(monkeypatch):
    monkeypatch.setattr(leanvit.warmstart, "RATES", (1e6, 1.0))
    lean, vit = lean_and_vit()
    fits = leanvit.warm_start(lean, vit, photos(vit, 32), steps=30, batch_size=4, progress=False)
    assert fits and all(fit.kept for fit in fits)


@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_any_number_of_steps(steps):
    lean, vit = lean_and_vit()
    assert leanvit.warm_start(lean, vit, photos(vit, 8), steps=steps, batch_size=4, progress=False)


@pytest.mark.parametrize(("count", "batch_size"), [(33, 32), (9, 1)])
def test_a_last_batch_of_one_image_measures_no_block_alone(count, batch_size):
    lean, vit = lean_and_vit()
    fits = leanvit.warm_start(lean, vit, photos(vit, count), steps=30, batch_size=batch_size, progress=False)
    assert all(fit.after < fit.before and fit.kept for fit in fits)


def test_a_model_in_bf16():
    lean, vit = lean_and_vit()
    images = photos(vit, 32).bfloat16()
    fits = leanvit.warm_start(lean.bfloat16(), vit.bfloat16(), images, steps=20, batch_size=4, progress=False)
    assert any(fit.kept for fit in fits)


def test_what_cannot_be_measured_is_an_error():
    lean, vit = lean_and_vit()
    with pytest.raises(leanvit.ConfigError, match=r"in float16: .* use float\(\) or bfloat16\(\)"):
        leanvit.warm_start(lean.half(), vit.half(), photos(vit, 4).half(), progress=False)
    lean, vit = lean_and_vit()
    with torch.no_grad():
        lean.blocks[1].mlp.fc1.bias.fill_(torch.nan)
    with pytest.raises(leanvit.ConfigError, match="block 1: its error is nan before anything is fitted"):
        leanvit.warm_start(lean, vit, photos(vit, 4), progress=False)


def test_blocks_before_the_first_change_are_left_out():
    lean, vit = lean_and_vit()
    fits = leanvit.warm_start(lean, vit, photos(vit, 8), steps=1, batch_size=4, progress=False)
    assert [fit.block for fit in fits] == [1, 2, 3]


def test_any_source_of_images():
    vit = small_vit()
    images = photos(vit, 12)
    labelled = TensorDataset(images, torch.zeros(12))
    results = []
    for source in (images, labelled, DataLoader(labelled, batch_size=4)):
        lean = leanvit.slim(vit, leanvit.DGSSA(layers=(0,)))
        leanvit.warm_start(lean, vit, source, steps=2, batch_size=4, progress=False)
        results.append(lean(images))
    assert torch.allclose(results[0], results[1]) and torch.allclose(results[0], results[2])


def test_nothing_is_left_in_training_mode_or_with_gradients():
    lean, vit = lean_and_vit()
    vit.train()
    leanvit.warm_start(lean, vit, photos(vit, 8), steps=1, batch_size=4, progress=False)
    assert vit.training and not lean.training
    assert all(parameter.grad is None for parameter in (*lean.parameters(), *vit.parameters()))


def test_progress_names_each_block(capsys):
    lean, vit = lean_and_vit()
    leanvit.warm_start(lean, vit, photos(vit, 8), steps=2, batch_size=4)
    assert "block 2: error" in capsys.readouterr().err


def test_bad_input():
    lean, vit = lean_and_vit()
    images = photos(vit, 4)
    with pytest.raises(leanvit.UnsupportedModelError, match="VisionTransformer is not a lean model"):
        leanvit.warm_start(vit, vit, images)
    with pytest.raises(leanvit.ConfigError, match="deployed model cannot be warm-started"):
        leanvit.warm_start(leanvit.deploy(lean), vit, images)
    with pytest.raises(leanvit.ConfigError, match="differ in blocks, width or patch grid"):
        leanvit.warm_start(lean, small_vit(depth=3), images)
    with pytest.raises(leanvit.ConfigError, match="steps=-1"):
        leanvit.warm_start(lean, vit, images, steps=-1)
    with pytest.raises(leanvit.ConfigError, match=r"lr=-1"):
        leanvit.warm_start(lean, vit, images, lr=-1)
    with pytest.raises(leanvit.ConfigError, match=r"prefix_weight=3"):
        leanvit.warm_start(lean, vit, images, prefix_weight=3)
    with pytest.raises(leanvit.LeanVitError, match="no images to work with"):
        leanvit.warm_start(lean, vit, images[:0])


def test_statistics_by_hand():
    """Attention that is the same for every image does not vary; attention that is uniform has rank one."""
    vit = small_vit(class_token=False, global_pool="avg")
    with torch.no_grad():
        for block in vit.blocks[:2]:
            block.attn.qkv.weight[: 2 * vit.embed_dim] = 0  # query and key are their biases
        vit.blocks[1].attn.qkv.bias[: 2 * vit.embed_dim] = 0
    layers = leanvit.attention_statistics(vit, photos(vit, 8))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert layers[0].relative_variance < 1e-6 < layers[3].relative_variance
    assert layers[0].effective_rank == layers[1].effective_rank == 1.0 < layers[3].effective_rank


def test_a_recorder_collects_what_it_was_asked_for():
    calls = []
    offer("a", 0, lambda: calls.append("closed") or torch.zeros(()))
    with leanvit.record("a") as found:
        offer("a", 3, lambda: torch.ones(()))
        offer("b", 3, lambda: calls.append("unwanted") or torch.zeros(()))
    assert not calls and found["b"] == [] and [(r.layer, float(r.value)) for r in found["a"]] == [(3, 1.0)]
    with leanvit.record() as everything:
        offer("b", 1, lambda: torch.zeros(()))
    assert len(everything["b"]) == 1


def test_one_image_is_too_few():
    lean, vit = lean_and_vit()
    with pytest.raises(leanvit.ConfigError, match="at least 2 images"):
        leanvit.warm_start(lean, vit, photos(vit, 1), progress=False)


def test_images_of_another_size():
    lean, vit = lean_and_vit()
    with pytest.raises(leanvit.InputSizeError, match="image size 48x48 does not fit"):
        leanvit.warm_start(lean, vit, torch.randn(4, 3, 48, 48), progress=False)


@pytest.mark.parametrize("method", ["glad:at=2", "dgssa:layers=1", "merging:r=1", "adavit"])
def test_what_was_frozen_stays_as_it_is(method):
    vit = small_vit().requires_grad_(False)
    lean = leanvit.slim(vit, *parse(method))
    leanvit.warm_start(lean, vit, photos(vit, 16), steps=2, batch_size=4, progress=False)
    inherited = {name: value for name, value in lean.named_parameters() if name in dict(vit.named_parameters())}
    assert inherited and all(torch.equal(value, vit.get_parameter(name)) for name, value in inherited.items())


def test_a_model_that_recomputes_its_activations():
    plain, vit = lean_and_vit()
    lean, _ = lean_and_vit()
    images = photos(vit, 16)
    leanvit.warm_start(plain, vit, images, steps=2, batch_size=4, progress=False)
    vit.set_grad_checkpointing(True)
    leanvit.warm_start(lean, vit, images, steps=2, batch_size=4, progress=False)
    assert torch.equal(lean(images), plain(images))
