"""Castling: the vanishing softmax attention, the switch, the convolutions, what it goes with and what it refuses."""

from __future__ import annotations

import csv

import pytest
import torch

import leanvit
from leanvit.methods import castling
from leanvit.methods.base import claim_attention

from .contract import photos, small_vit
from .test_train import Images


def test_layers_as_people_write_them():
    for layers in ("1-3", (1, 2, 3), [3, 1, 2]):
        assert leanvit.Castling(layers=layers).layers == (1, 2, 3)
    assert leanvit.Castling(layers=2).layers == (2,)
    assert leanvit.Castling().blocks(4) == (0, 1, 2, 3)
    with pytest.raises(leanvit.ConfigError, match="layers is empty"):
        leanvit.Castling(layers=())


def test_the_kernel_is_as_large_as_fits():
    assert leanvit.slim(small_vit(), leanvit.Castling()).lean.methods[0].kernel == 3
    assert leanvit.slim(small_vit(img_size=64), leanvit.Castling()).lean.methods[0].kernel == 5
    assert leanvit.slim(small_vit(), leanvit.Castling(conv="tokens")).lean.methods[0].kernel == 9


def test_heads_that_do_not_divide_the_width():
    vit = small_vit()
    vit.blocks[1].attn.num_heads = 5
    with pytest.raises(leanvit.MethodError, match="castling: block 1 has 5 heads for a width of 48"):
        leanvit.slim(vit, leanvit.Castling(layers=(1,)))


def test_an_attention_is_claimed_once():
    lean = leanvit.slim(small_vit(), leanvit.Castling(layers=(1,)))
    assert claim_attention("other", 0, lean.blocks[0]) is lean.blocks[0].attn
    with pytest.raises(leanvit.MethodError, match="other: the attention of block 1 is castling's already"):
        claim_attention("other", 1, lean.blocks[1])


def test_the_output_is_the_formula():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.Castling(layers=(0,), kernel=3))
    attention = lean.blocks[0].attn
    with torch.no_grad():
        attention.gain.copy_(torch.tensor([0.5, 1.0, 2.0]))
        attention.conv.weight.normal_()
    x = torch.randn(2, 17, 48)
    q, k, v = attention.qkv(x).view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = (tensor / tensor.norm(dim=-1, keepdim=True) for tensor in (q, k))
    linear = v / 2 + q @ k.transpose(-2, -1) @ v / torch.pi
    linear = linear / linear.norm(dim=-1, keepdim=True) * attention.gain[:, None, None]
    patches = v[:, :, 1:].transpose(2, 3).reshape(2, 48, 4, 4)
    filters = attention.conv.weight.repeat_interleave(16, dim=0).unsqueeze(1)
    local = torch.nn.functional.conv2d(patches, filters, padding=1, groups=48).flatten(2).transpose(1, 2)
    alone = v[:, :, :1].transpose(1, 2).flatten(2) * attention.conv.weight[:, 1, 1].repeat_interleave(16)
    local = torch.cat([alone, local], dim=1)  # the class token has no neighbours
    expected = attention.proj(linear.transpose(1, 2).flatten(2) + local)
    got = attention.attend(x, leanvit.Tokens(x, 1, (4, 4))).x
    assert (got - expected).abs().max() < 1e-4


def test_the_threshold_grows_until_nothing_survives():
    method = leanvit.Castling(auxiliary=0.5, threshold=0.01)
    thresholds = [method.threshold_at(progress) for progress in (0, 0.125, 0.25, 0.499, 0.5, 0.9, 1)]
    assert thresholds[:3] == pytest.approx([0.01, 0.01**0.75, 0.1]) and thresholds[4:] == [1, 1, 1]
    assert thresholds == sorted(thresholds)
    assert leanvit.Castling().threshold_at(0.7) == 1 > leanvit.Castling().threshold_at(0.69)
    assert leanvit.Castling(auxiliary=0).threshold_at(0) == 1


def test_softmax_attention_is_added_where_it_passes_the_threshold():
    vit = small_vit()
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.Castling(layers=(1,), kernel=3))
    method = lean.lean.methods[0]
    without = lean(images)
    density = []
    for progress in (0.0, 0.35, 0.69, 0.7):
        method.set_progress(lean, progress)
        with leanvit.record() as found:
            logits = lean(images)
        (entry,) = found["density"]
        epsilon = method.threshold_at(progress)
        by_hand = (found["softmax_attention"][0].value > epsilon).float().mean()
        assert entry.layer == 1 and torch.allclose(entry.value, by_hand)
        assert torch.equal(logits, without) == (progress == 0.7)
        density.append(float(entry.value))
    assert density == sorted(density, reverse=True) and density[0] > density[-1] == 0
    assert found["linear_attention"][0].value.shape == (6, 3, 17, 17)


def test_the_regulariser_is_what_survives():
    vit = small_vit()
    lean = leanvit.slim(vit, leanvit.Castling(layers=(0, 1), kernel=3, sparsity_weight=0.5, threshold=0.1))
    method = lean.lean.methods[0]
    method.set_progress(lean, 0.0)
    with leanvit.record() as found:
        lean(photos(vit))
    loss = method.losses(found)["auxiliary"]
    masses = [(m.value * (m.value > 0.1)).sum(-1).mean() for m in found["softmax_attention"]]
    assert torch.allclose(loss, 0.5 * torch.stack(masses).mean())
    loss.backward()
    assert lean.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    method.set_progress(lean, 1.0)
    with leanvit.record() as found:
        lean(photos(vit))
    assert method.losses(found) == {} and float(method.metrics(found)["density"]) == 0


def test_the_switch_is_refused_while_softmax_attention_survives():
    vit = small_vit()
    images = photos(vit)
    lean = leanvit.slim(vit, leanvit.Castling(kernel=3))
    method = lean.lean.methods[0]
    finished = leanvit.deploy(lean)(images)
    method.set_progress(lean, 0.1)
    message = (
        r"block 0 is not ready to deploy: softmax attention above 0\.035 is still added; on random images deploying it "
        r"changes the logits by 0\.\d+ of their spread, castling density 0\.\d+; .*force=True"
    )
    with pytest.raises(leanvit.DeployError, match=message):
        leanvit.deploy(lean)
    assert torch.equal(leanvit.deploy(lean, force=True)(images), finished)
    method.set_progress(lean, 0.7)
    assert torch.equal(leanvit.deploy(lean)(images), finished)


@pytest.mark.parametrize("force", ["yes", 1, None])
def test_force_is_true_or_false(force):
    with pytest.raises(leanvit.ConfigError, match=f"force={force!r} is neither True nor False"):
        leanvit.deploy(leanvit.slim(small_vit(), leanvit.Castling()), force=force)


def test_force_does_not_make_a_model_lean():
    with pytest.raises(leanvit.DeployError, match="is not a lean model"):
        leanvit.deploy(small_vit(), force=True)


def test_only_what_inference_needs_is_left():
    lean = leanvit.slim(small_vit(), leanvit.Castling(kernel=3))
    trained, deployed = lean.state_dict().keys(), leanvit.deploy(lean).state_dict().keys()
    assert trained - deployed == {f"blocks.{index}.attn.epsilon" for index in range(4)}


@pytest.mark.parametrize("conv", ["grid", "tokens"])
@torch.no_grad()
def test_the_start_is_the_least_squares_fit(conv):
    """Neither another gain nor other filters come nearer to the dense heads."""
    vit = small_vit()
    images = photos(vit, 32)
    lean = leanvit.slim(vit, leanvit.Castling(layers=(0,), conv=conv, kernel=3))
    leanvit.warm_start(lean, vit, images, steps=0, progress=False)
    attention = lean.blocks[0].attn
    x = vit.blocks[0].norm1(vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
    wanted = heads(vit.blocks[0].attn, lambda: vit.blocks[0].attn(x))
    tokens = leanvit.Tokens(x, 1, (4, 4))

    def error():
        return float((heads(attention, lambda: attention.attend(x, tokens)) - wanted).square().mean())

    fitted = error()
    assert fitted < 0.5 * float(wanted.var())
    for parameter in (attention.gain, attention.conv.weight):
        kept = parameter.clone()
        for _ in range(10):
            parameter.copy_(kept + 0.03 * torch.randn_like(kept))
            assert error() > fitted
        parameter.copy_(kept)


def heads(attention, run):
    """What comes to the projection of an attention when it runs."""
    seen = []
    handle = attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0]


def test_weights_run_at_any_size():
    """Nothing of it depends on the number of tokens: at another size only the position embedding is another."""
    vit = small_vit(img_size=64)
    lean = leanvit.slim(vit, leanvit.Castling(kernel=3))
    before = {name: value.clone() for name, value in lean.state_dict().items() if "blocks" in name}
    lean.set_input_size((128, 96))
    assert all(torch.equal(value, before[name]) for name, value in lean.state_dict().items() if "blocks" in name)
    assert leanvit.deploy(lean)(torch.randn(1, 3, 128, 96)).isfinite().all()
    with pytest.raises(leanvit.MethodError, match="kernel=3 is larger than the patch grid of 2×8"):
        lean.set_input_size((16, 64))


def test_a_grid_that_is_not_known_is_refused():
    lean = leanvit.slim(small_vit(dynamic_img_size=True), leanvit.Castling(kernel=3))
    with pytest.raises(leanvit.InputSizeError, match="gets 40 patch tokens and knows a grid of 4×4"):
        lean(torch.randn(1, 3, 40, 64))
    along = leanvit.slim(small_vit(dynamic_img_size=True), leanvit.Castling(conv="tokens"))
    assert along(torch.randn(1, 3, 40, 64)).shape == (1, 10)


@torch.no_grad()
@pytest.mark.parametrize("conv", ["grid", "tokens"])
def test_behind_removed_and_merged_tokens(conv):
    """Removed patches count as zero in the convolution; a merged token counts for all it stands for."""
    lean = leanvit.slim(small_vit(), leanvit.Castling(conv=conv, kernel=3))
    attention = lean.blocks[2].attn
    attention.conv.weight.normal_()
    x = torch.randn(2, 17, 48)
    tokens = leanvit.Tokens(x, 1, (4, 4))
    index = torch.tensor([[0, 1, 5, 9, 15], [2, 3, 4, 10, 11]])
    kept = tokens.keep(index)
    got = attention.attend(kept.x, kept).x
    assert got.shape == kept.x.shape
    if conv == "grid":
        image = torch.zeros(2, 16, 48).scatter(1, index.unsqueeze(-1).expand(-1, -1, 48), values(attention, kept.x))
        local = attention.conv(torch.zeros(2, 17, 48), torch.cat([torch.zeros(2, 1, 48), image], 1), tokens)[:, 1:]
        local = local.gather(1, index.unsqueeze(-1).expand(-1, -1, 48))
        alone = attention.conv(torch.zeros(2, 6, 48), attention.qkv(kept.x)[..., 96:], kept)[:, 1:]
        assert torch.allclose(alone, local, atol=1e-5)
    else:
        merged = tokens.merge(lambda patches: patches[:, ::2], torch.full((2, 9), 2.0))
        alike = attention.attend(merged.x, merged).x
        assert not torch.allclose(alike, attention.attend(merged.x, tokens.with_x(merged.x)).x)


@torch.no_grad()
@pytest.mark.parametrize("then", ["", "+pruning:at=1"])
@pytest.mark.parametrize("conv", ["grid", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_gives_what_torch_gives(conv, then, dtype, monkeypatch):
    vit = small_vit()
    lean = leanvit.slim(vit, *leanvit.methods.parse(f"castling:conv={conv},kernel=3,layers=0,2,3{then}"))
    for index in (0, 2, 3):
        lean.blocks[index].attn.conv.weight.normal_(std=0.3)
    fast, images = leanvit.deploy(lean), photos(vit)
    runs = []
    wanted = castling.angular_attention
    monkeypatch.setattr(castling, "angular_attention", lambda *some: runs.append(some) or wanted(*some))
    got = fast.to(dtype)(images.to(dtype))
    assert len(runs) == 3 and (runs[-1][-1] is not None) == bool(then and conv == "grid")
    monkeypatch.setattr(castling, "takes_kernel", lambda *_: False)
    by_torch = fast.to(dtype)(images.to(dtype))
    monkeypatch.undo()
    exact = lean(images)
    if dtype is torch.float32:
        torch.testing.assert_close(got, by_torch, rtol=1e-5, atol=1e-5)
        assert (got - exact).abs().max() < 1e-4  # one filter a head
    else:  # each rounds in its own way; neither is nearer to what fp32 gives
        error, error_by_torch = ((logits - exact).abs().mean() for logits in (got, by_torch))
        assert error < 1.5 * error_by_torch


@torch.no_grad()
def test_graphs_for_other_engines_have_operations_of_torch_alone():
    fast = leanvit.deploy(leanvit.slim(small_vit(), leanvit.Castling(kernel=3)))
    program = torch.export.export(fast, (torch.randn(2, 3, 32, 32),))
    assert "leanvit" not in str(program.graph)


def values(attention, x):
    return attention.qkv(x)[:, 1:, 96:]


@torch.no_grad()
def test_the_attention_alone_does_not_run():
    lean = leanvit.slim(small_vit(), leanvit.Castling())
    with pytest.raises(leanvit.MethodError, match="run the block"):
        lean.blocks[0].attn(torch.randn(1, 17, 48))


@pytest.mark.parametrize("conv", ["grid", "tokens"])
@pytest.mark.parametrize(("width", "heads", "depth"), [(48, 3, 4), (96, 4, 3)])
def test_macs_equal_the_formula(width, heads, depth, conv):
    """The attention part costs 2·N·C·d + N·C·k, k the taps."""
    vit = small_vit(embed_dim=width, num_heads=heads, depth=depth, img_size=96)  # 145 tokens
    lean = leanvit.slim(vit, leanvit.Castling(conv=conv, layers=(0, 1)))
    taps = {"grid": 25, "tokens": 9}[conv]
    tokens = 145
    saved = 2 * tokens**2 * width - (2 * tokens * width * (width // heads) + tokens * width * taps)
    dense = leanvit.count(vit).macs
    assert dense - leanvit.count(lean).macs == pytest.approx(2 * saved, rel=5e-3)
    assert leanvit.count(lean).macs == pytest.approx(dense - 2 * saved, rel=1e-3)


def test_densities_are_in_the_metrics_of_the_run(tiny_vit, tmp_path):
    lean = leanvit.slim(tiny_vit, leanvit.Castling(layers=(1, 2)))
    options = {"epochs": 4, "batch_size": 16, "output": tmp_path, "progress": False}
    result = leanvit.distill(lean, tiny_vit, Images(), Images(), **options)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    densities = [row["train_castling_density"] for row in rows]
    assert densities[0] > 0 == densities[-1] and densities == sorted(densities, reverse=True)
    for row in rows:
        by_layer = [row["train_castling_density.1"], row["train_castling_density.2"]]
        assert sum(by_layer) / 2 == pytest.approx(row["train_castling_density"])
        terms = row["train_ce"] + row["train_kd"] + row["train_tokens"]
        assert terms == pytest.approx(row["train_loss"], rel=1e-5)  # a density is no loss
    assert result.history[0]["train_castling_density"] == densities[0]
    assert leanvit.deploy(lean)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_progress_line_names_no_single_layer(capsys):
    from leanvit.progress import TrainingBar

    row = {"epoch": 1, "train_loss": 1.0, "train_x_density": 0.25, "train_x_density.3": 0.125, "images_per_second": 9.0}
    TrainingBar(1, 1, shown=True).epoch_done(row)
    line = capsys.readouterr().err
    assert "x_density 0.250" in line and "density.3" not in line
