from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from leanvit import methods, store
from leanvit.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedModelError
from leanvit.methods.glad import GLAD
from leanvit.model import LeanVisionTransformer, deploy, restore, slim
from leanvit.store import from_hub, load, load_checkpoint, push_to_hub, read_config, resolve_model, save

from .contract import small_vit

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lean(tiny_vit) -> LeanVisionTransformer:
    return slim(tiny_vit, *methods.parse("dgssa:layers=0,1+glad:at=2,3")).eval()


@pytest.fixture
def saved(tiny_vit, tmp_path) -> Path:
    return save(tiny_vit, tmp_path / "model")


@pytest.fixture
def saved_lean(lean, tmp_path) -> Path:
    return save(lean, tmp_path / "lean")


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def beside(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


class TestRoundTrip:
    def test_plain(self, tiny_vit, saved, images) -> None:
        again = load(saved)
        assert type(again) is VisionTransformer and not again.training
        assert torch.equal(again(images), tiny_vit(images))

    def test_timm_reads_it_too(self, tiny_vit, saved, images) -> None:
        again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
        assert torch.equal(again(images), tiny_vit(images))

    @pytest.mark.parametrize("text", [*methods.available(), "dgssa:layers=0,1+glad:at=2,3", ""])
    @pytest.mark.parametrize("deployed", [False, True])
    def test_lean(self, images, tmp_path, text, deployed) -> None:
        dense = timm.create_model(ARCHITECTURE, img_size=32, num_classes=10, **{**SMALL, "depth": 6})
        model = slim(dense, *(methods.parse(text) if text else ()), images=images).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model = deploy(model) if deployed else model
        again = load(save(model, tmp_path / "model"))
        assert type(again) is type(model) and again.lean == model.lean
        assert torch.equal(again(images), model(images))
        assert {k: p.requires_grad for k, p in again.named_parameters()} == {
            k: p.requires_grad for k, p in model.named_parameters()
        }

    def test_restore_after_loading(self, tiny_vit, saved_lean, images) -> None:
        assert torch.equal(restore(load(saved_lean))(images), tiny_vit(images))

    def test_in_the_middle_of_training(self, lean, tmp_path, images) -> None:
        for method in lean.lean.methods:
            method.set_progress(lean, 0.2)
        assert torch.equal(load(save(lean, tmp_path / "x"))(images), lean(images))

    def test_after_changing_size_and_classes(self, lean, tmp_path) -> None:
        lean.set_input_size(img_size=(48, 40))
        lean.reset_classifier(3)
        again = load(save(lean, tmp_path / "x"))
        images = torch.rand(1, 3, 48, 40)
        assert again.num_classes == 3 and torch.equal(again(images), lean(images))

    def test_without_a_head_and_with_one_where_none_was(self, lean, tiny_vit, tmp_path) -> None:
        lean.reset_classifier(0)
        assert load(save(lean, tmp_path / "x")).num_classes == 0
        tiny_vit.reset_classifier(0)
        lean = slim(tiny_vit, *lean.lean.methods)
        lean.reset_classifier(5)
        assert load(save(lean, tmp_path / "y")).head.weight.shape[0] == 5

    def test_patches_that_are_not_square(self, tmp_path) -> None:
        lean = slim(small_vit(patch_size=(8, 4)), GLAD(at=(1,)))
        images = torch.rand(1, 3, 32, 32)
        assert torch.equal(load(save(lean, tmp_path / "x"))(images), lean(images))

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "in_chans": 1}),
            ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 48, "num_heads": 3, "depth": 1}),
            ("deit3_small_patch16_224", {"img_size": 32, "depth": 1, "qk_norm": True, "drop_path_rate": 0.1}),
            ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}),
            ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 1}),
        ],
    )
    def test_kinds_of_models(self, name, options, tmp_path) -> None:
        model = timm.create_model(name, num_classes=7, **options).eval()
        again = load(save(model, tmp_path / "x"))
        images = torch.rand(1, options.get("in_chans", 3), *again.patch_embed.img_size)
        assert torch.equal(again(images), model(images))

    def test_precision_is_kept(self, tiny_vit, tmp_path) -> None:
        again = load(save(tiny_vit.bfloat16(), tmp_path / "x"))
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}

    def test_class_names_and_extra(self, tiny_vit, tmp_path) -> None:
        names = [f"kind {index}" for index in range(10)]
        folder = save(tiny_vit, tmp_path / "x", class_names=names, extra={"top1": 97.5})
        again = load(folder)
        assert again.pretrained_cfg["label_names"] == names
        assert read_config(folder)["leanvit"] == {"version": 1, "extra": {"top1": 97.5}}
        assert load(save(again, tmp_path / "y")).pretrained_cfg["label_names"] == names

    def test_preprocessing_is_kept(self, tiny_vit, saved) -> None:
        from leanvit.data import data_config

        assert data_config(load(saved)) == data_config(tiny_vit)

    def test_the_model_itself_is_left_as_it_is(self, lean, tmp_path) -> None:
        before = (dict(lean.pretrained_cfg), lean.lean, lean.training)
        save(lean, tmp_path / "x", class_names=list("abcdefghij"))
        assert (dict(lean.pretrained_cfg), lean.lean, lean.training) == before

    def test_card(self, saved_lean) -> None:
        card = (saved_lean / "README.md").read_text()
        assert "library_name: leanvit" in card and "license: apache-2.0" in card
        assert "`vit_tiny_patch16_224` with `dgssa:layers=0,1+glad:at=2,3`: 10 classes, images of 32×32" in card


class TestSaving:
    def test_replacing(self, tiny_vit, saved, images) -> None:
        torch.nn.init.zeros_(tiny_vit.head.weight)
        with pytest.raises(CheckpointError, match="it holds a model; overwrite=True replaces it"):
            save(tiny_vit, saved)
        save(tiny_vit, saved, overwrite=True)
        assert torch.equal(load(saved)(images), tiny_vit(images))
        assert beside(saved) == ["model"]

    def test_other_things_are_not_replaced(self, tiny_vit, tmp_path) -> None:
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "thesis.txt").touch()
        with pytest.raises(CheckpointError, match="work: it holds something else than a model"):
            save(tiny_vit, tmp_path / "work", overwrite=True)
        with pytest.raises(CheckpointError, match=r"thesis\.txt: it is a file"):
            save(tiny_vit, tmp_path / "work" / "thesis.txt", overwrite=True)

    def test_into_an_empty_folder(self, tiny_vit, tmp_path) -> None:
        (tmp_path / "x").mkdir()
        load(save(tiny_vit, tmp_path / "x"))

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_full_disk(self, tiny_vit, tmp_path, images, overwrite) -> None:
        target = tmp_path / "model"
        if overwrite:
            save(tiny_vit, target)
        expected = tiny_vit(images)
        torch.nn.init.zeros_(tiny_vit.head.weight)
        with (
            file_size_limit(4096),
            pytest.raises(CheckpointError, match=r"cannot save to .*model: .*File too large"),
        ):
            save(tiny_vit, target, overwrite=True)
        assert beside(target) == (["model"] if overwrite else [])
        if overwrite:
            assert torch.equal(load(target)(images), expected)

    def test_read_only_folder(self, tiny_vit, tmp_path, monkeypatch) -> None:
        def refuse(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match=r"cannot save to .*x: Read-only file system"):
            save(tiny_vit, tmp_path / "x")
        assert not any(tmp_path.iterdir())

    def test_a_parent_that_is_a_file(self, tiny_vit, tmp_path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"cannot save to .*file/x: Not a directory"):
            save(tiny_vit, tmp_path / "file" / "x")

    def test_the_old_model_comes_back_when_the_new_one_cannot_take_its_place(
        self, tiny_vit, saved, monkeypatch
    ) -> None:
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if self.name.endswith(".draft"):
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match=r"cannot save to .*model: Input/output error"):
            save(tiny_vit, saved, overwrite=True)
        assert beside(saved) == ["model"]
        load(saved)

    def test_interrupted(self, tiny_vit, tmp_path, monkeypatch) -> None:
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(store, "_card", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tiny_vit, tmp_path / "x")
        assert not any(tmp_path.iterdir())

    def test_through_a_link(self, tiny_vit, tmp_path) -> None:
        (tmp_path / "link").symlink_to(save(tiny_vit, tmp_path / "model"))
        save(tiny_vit, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink() and beside(tmp_path / "model") == ["link", "model"]
        load(tmp_path / "model")

    def test_into_the_current_folder(self, tiny_vit, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="it is the current folder"):
            save(tiny_vit, ".", overwrite=True)

    def test_class_names_that_do_not_fit(self, tiny_vit, tmp_path) -> None:
        with pytest.raises(ConfigError, match="2 class names for a model of 10 classes"):
            save(tiny_vit, tmp_path / "x", class_names=["cat", "dog"])

    def test_extra_that_json_cannot_hold(self, tiny_vit, tmp_path) -> None:
        with pytest.raises(CheckpointError, match="cannot be described in JSON"):
            save(tiny_vit, tmp_path / "x", extra={"tensor": torch.zeros(1)})
        assert not any(tmp_path.iterdir())

    def test_a_model_that_timm_did_not_make(self, tmp_path) -> None:
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
        with pytest.raises(CheckpointError, match=r"only a model that timm\.create_model made"):
            save(model, tmp_path / "x")

    def test_a_model_that_was_changed_by_hand(self, tiny_vit, tmp_path) -> None:
        tiny_vit.blocks[1].mlp.fc1 = torch.nn.Linear(48, 100)
        with pytest.raises(CheckpointError, match=r"cannot be described: .* gives another blocks\.1\.mlp\.fc1\.bias"):
            save(tiny_vit, tmp_path / "x")

    def test_another_kind_of_model(self, tmp_path) -> None:
        with pytest.raises(UnsupportedModelError, match="ResNet is not supported"):
            save(timm.create_model("resnet10t"), tmp_path / "x")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestLoading:
    def test_missing_folder(self, tmp_path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere holds no model: there is no config\.json"):
            load(tmp_path / "nowhere")

    def test_missing_weights(self, saved) -> None:
        (saved / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no such file: .*model\.safetensors"):
            load(saved)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(self, saved, share) -> None:
        file = saved / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
            load(saved)

    def test_other_weights(self, saved) -> None:
        (saved / "model.safetensors").write_bytes(b"these are no weights at all")
        with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
            load(saved)

    @pytest.mark.parametrize("new_format", [True, False])
    def test_pickled_weights(self, saved, tiny_vit, new_format) -> None:
        file = saved / "model.safetensors"
        torch.save(tiny_vit.state_dict(), file, _use_new_zipfile_serialization=new_format)
        with pytest.raises(CheckpointError, match="is a pickled checkpoint, which can run code"):
            load(saved)

    def test_weights_of_another_architecture(self, saved, tmp_path) -> None:
        other = timm.create_model(ARCHITECTURE, img_size=32, num_classes=10, **{**SMALL, "embed_dim": 96})
        shutil.copy(save(other, tmp_path / "other") / "model.safetensors", saved)
        match = r"another architecture: cls_token is \(1, 1, 96\) in the file and \(1, 1, 48\) in the model"
        with pytest.raises(CheckpointError, match=match):
            load(saved)

    def test_weights_of_another_method(self, saved, saved_lean) -> None:
        shutil.copy(saved / "model.safetensors", saved_lean)
        with pytest.raises(
            CheckpointError, match=r"blocks\.0\.attn\.\w+ is missing in the file and \(.*\) in the model"
        ):
            load(saved_lean)

    def test_integers_for_weights(self, saved) -> None:
        weights = load_file(saved / "model.safetensors")
        save_file(weights | {"head.bias": weights["head.bias"].long()}, saved / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"is damaged: head\.bias is torch\.int64 and should be like"):
            load(saved)

    @pytest.mark.parametrize("text", ["", "{", "\xff", "[]", "{}", '{"architecture": 3}'])
    def test_config_that_is_none(self, saved, text) -> None:
        (saved / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|names no architecture)"):
            load(saved)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c.update(architecture="vit_gigantic"), "timm .* has no architecture 'vit_gigantic'"),
            (
                lambda c: c.update(architecture="resnet10t", model_args={}),
                "describes no model that can be built: ResNet",
            ),
            (lambda c: c["model_args"].update(wings=2), "describes no model that can be built: .*wings"),
            (
                lambda c: c["leanvit"].update(version=2),
                "has version 2, this leanvit reads up to 1; upgrade it",
            ),
            (lambda c: c["leanvit"].pop("version"), "its leanvit part has no version"),
            (lambda c: c["leanvit"].update(version=True), "its leanvit part has no version"),
            (lambda c: c.update(label_names=7), "label_names is not a list of class names"),
            (lambda c: c.update(label_names=[1, 2]), "label_names is not a list of class names"),
            (lambda c: c.update(model_args=None), "describes no model that can be built"),
            (lambda c: c["model_args"].update(embed_dim=0), "describes no model that can be built"),
            (lambda c: c.update(leanvit=[]), "its leanvit part has no version"),
            (lambda c: c["leanvit"].update(methods="dgssa"), r"leanvit\.methods is 'dgssa' and not a list"),
            (
                lambda c: c["leanvit"].update(methods=["dgssa"]),
                r"leanvit\.methods holds 'dgssa', which is no method",
            ),
            (lambda c: c["leanvit"].pop("deployed"), r"leanvit\.deployed is None and not a bool"),
            (lambda c: c["leanvit"]["methods"][0].update(name="magic"), "unknown method 'magic'"),
            (lambda c: c["leanvit"]["methods"][0].update(spell=1), "dgssa has no parameter 'spell'"),
            (lambda c: c["leanvit"]["methods"][0].update(guidance=7), "guidance=7 is not in"),
            (
                lambda c: c["leanvit"]["methods"][0].update(layers=[9]),
                "block 9 does not exist",
            ),
        ],
    )
    def test_config_that_cannot_be_used(self, saved_lean, change, match) -> None:
        edit(saved_lean, change)
        with pytest.raises(CheckpointError, match=match):
            load(saved_lean)


class TestCheckpoint:
    @pytest.fixture
    def file(self, tiny_vit, tmp_path) -> Path:
        save_file(tiny_vit.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    def other(self, **options: Any) -> VisionTransformer:
        return timm.create_model(ARCHITECTURE, **{"img_size": 32, "num_classes": 10, **SMALL, **options}).eval()

    def test_file_and_folder(self, tiny_vit, file, saved, images) -> None:
        for path in (file, str(saved)):
            model = self.other()
            load_checkpoint(model, path)
            assert torch.equal(model(images), tiny_vit(images))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"embed_dim": 96}, r"cls_token is \(1, 1, 48\) in the file and \(1, 1, 96\) in the model"),
            (
                {"patch_size": 16},
                r"patch_embed\.proj\.weight is \(48, 3, 8, 8\) in the file and \(48, 3, 16, 16\)",
            ),
            ({"depth": 3}, r"blocks\.3\.\S+ is \(48,\) in the file and missing in the model"),
            ({"depth": 5}, r"blocks\.4\.\S+ is missing in the file and \(48,\) in the model"),
            ({"num_classes": 3}, r"head\.weight is \(10, 48\) in the file and \(3, 48\) in the model"),
        ],
    )
    def test_another_architecture(self, file, options, match) -> None:
        with pytest.raises(CheckpointError, match=f"is of another architecture: {match}"):
            load_checkpoint(self.other(**options), file)

    def test_another_input_size_is_resampled(self, tiny_vit, file) -> None:
        model = self.other(img_size=48)
        load_checkpoint(model, file)
        tiny_vit.set_input_size(img_size=48)
        torch.testing.assert_close(model.pos_embed, tiny_vit.pos_embed)

    def test_missing(self, tiny_vit, tmp_path) -> None:
        with pytest.raises(CheckpointError, match=r"no such file: .*nothing\.safetensors"):
            load_checkpoint(tiny_vit, tmp_path / "nothing.safetensors")


class TestResolving:
    def test_timm_name(self) -> None:
        model = resolve_model("deit_tiny_patch16_224")
        assert model.num_classes == 1000 and not model.training

    def test_checkpoint_without_other_options(self, shared_data) -> None:
        file = shared_data / "deit_tiny_patch16_224.safetensors"
        model = resolve_model("deit_tiny_patch16_224", checkpoint=file, pretrained=True)
        assert torch.equal(model.head.weight, load_file(file)["head.weight"])

    def test_checkpoint_for_other_classes_and_size(self, shared_data) -> None:
        file = shared_data / "deit_tiny_patch16_224.safetensors"
        model = resolve_model("deit_tiny_patch16_224", checkpoint=file, num_classes=10, img_size=160)
        assert model.num_classes == 10 and model(torch.zeros(1, 3, 160, 160)).shape == (1, 10)
        assert torch.equal(model.blocks[0].attn.qkv.weight, load_file(file)["blocks.0.attn.qkv.weight"])

    def test_checkpoint_decides_the_number_of_classes(self, tmp_path) -> None:
        model = timm.create_model("deit_tiny_patch16_224", num_classes=10)
        save_file(model.state_dict(), tmp_path / "ten.safetensors")
        again = resolve_model("deit_tiny_patch16_224", checkpoint=tmp_path / "ten.safetensors")
        assert torch.equal(again.head.weight, model.head.weight)

    def test_checkpoint_of_another_architecture(self, shared_data) -> None:
        file = shared_data / "deit_tiny_patch16_224.safetensors"
        with pytest.raises(CheckpointError, match=r"cls_token is \(1, 1, 192\) in the file and \(1, 1, 384\)"):
            resolve_model("deit_small_patch16_224", checkpoint=file)

    @pytest.mark.parametrize("prefix", ["", "local-dir:"])
    def test_folder(self, lean, saved_lean, images, prefix) -> None:
        assert torch.equal(resolve_model(f"{prefix}{saved_lean}")(images), lean(images))

    def test_run(self, tiny_vit, lean, tmp_path) -> None:
        save(tiny_vit, tmp_path / "run" / "last")
        assert type(resolve_model(str(tmp_path / "run"))) is VisionTransformer
        save(lean, tmp_path / "run" / "best")
        assert type(resolve_model(str(tmp_path / "run"))) is LeanVisionTransformer

    def test_folder_at_another_size(self, saved_lean) -> None:
        model = resolve_model(str(saved_lean), img_size=(40, 48), num_classes=3)
        assert model(torch.zeros(1, 3, 40, 48)).shape == (1, 3)

    @pytest.mark.parametrize("size", [100, (96, 100), 8, -16])
    def test_size_that_the_patch_size_does_not_divide(self, size) -> None:
        with pytest.raises(InputSizeError, match=r"image size (100|8|-16) is no multiple of the patch size 16; \d+"):
            resolve_model("deit_tiny_patch16_224", img_size=size, pretrained=True)

    def test_folder_at_an_impossible_size(self, saved) -> None:
        with pytest.raises(InputSizeError, match="image size 44 is no multiple of the patch size 8; 40 and 48 are"):
            resolve_model(str(saved), img_size=44)

    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match=r"no model 'deit_tinny_patch16_224'; did you mean deit_tiny_patch16_224"):
            resolve_model("deit_tinny_patch16_224")
        with pytest.raises(ConfigError, match="no model 'runs/none'; give a timm name, a folder or hf-hub"):
            resolve_model("runs/none")

    @pytest.mark.parametrize("prefix", ["", "local-dir:"])
    def test_folder_without_a_model(self, tmp_path, prefix) -> None:
        with pytest.raises(CheckpointError, match=r"holds no model: there is no config.json in it, nor in best/ or"):
            resolve_model(f"{prefix}{tmp_path}")

    def test_another_kind_of_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="HybridEmbed is not supported"):
            resolve_model("vit_tiny_r_s16_p8_224")
        with pytest.raises(UnsupportedModelError, match="ResNet is not supported; timm's VisionTransformer is"):
            resolve_model("resnet10t", pretrained=True)

    def test_unknown_weights(self) -> None:
        with pytest.raises(ConfigError, match=r"no model 'deit_tiny_patch16_224\.nobodys': Invalid pretrained tag"):
            resolve_model("deit_tiny_patch16_224.nobodys", pretrained=True)

    def test_weights_that_cannot_be_downloaded(self, monkeypatch) -> None:
        create = timm.create_model

        def refuse(name: str, pretrained: bool = False, **options: Any) -> VisionTransformer:
            if pretrained:
                raise OSError("no connection\nand a page of advice")
            return create(name, **options)

        monkeypatch.setattr(store.timm, "create_model", refuse)
        with pytest.raises(CheckpointError, match=r"no weights for deit_tiny_patch16_224 to be had: no connection$"):
            resolve_model("deit_tiny_patch16_224", pretrained=True)


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch) -> Path:
        """A folder that stands for the hub: one folder in it for each repository."""
        root = tmp_path / "hub"

        class Api:
            def __init__(self, **_):
                pass

            def create_repo(self, repo_id, **_):
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, repo_id, folder_path, **_):
                shutil.copytree(folder_path, root / repo_id)
                return f"https://hub/{repo_id}"

        def download(repo_id, name, **_):
            if not (root / repo_id).is_dir():
                raise OSError(f"{repo_id} was not found\nand a page of advice")
            return str(root / repo_id / name)

        monkeypatch.setattr(store, "HfApi", Api)
        monkeypatch.setattr(store, "hf_hub_download", download)
        monkeypatch.setattr(store, "snapshot_download", lambda repo_id, **_: str(root / repo_id))
        return root

    def test_there_and_back(self, hub, lean, images) -> None:
        assert push_to_hub(lean, "me/lean-vit") == "https://hub/me/lean-vit"
        assert "# lean-vit" in (hub / "me/lean-vit/README.md").read_text()
        assert torch.equal(from_hub("me/lean-vit@main")(images), lean(images))
        assert torch.equal(resolve_model("hf-hub:me/lean-vit")(images), lean(images))

    def test_missing(self, hub) -> None:
        with pytest.raises(CheckpointError, match=r"^me/none on the Hugging Face hub: me/none was not found$"):
            from_hub("me/none")

    def test_not_a_vision_transformer(self, hub, monkeypatch) -> None:
        (hub / "me/cnn").mkdir(parents=True)
        (hub / "me/cnn/config.json").write_text('{"architecture": "resnet10t"}')
        create = timm.create_model
        monkeypatch.setattr(store.timm, "create_model", lambda *_, **__: create("resnet10t"))
        with pytest.raises(UnsupportedModelError, match="ResNet is not supported"):
            from_hub("me/cnn")

    def test_refused(self, hub, lean, monkeypatch) -> None:
        def refuse(*_, **__):
            raise OSError("401: not logged in")

        monkeypatch.setattr(store.HfApi, "create_repo", refuse)
        with pytest.raises(CheckpointError, match="me/lean on the Hugging Face hub: 401: not logged in"):
            push_to_hub(lean, "me/lean")
