"""Explaining photos: predictions and cost of both models, what became of each patch, pictures, and bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import leanvit
from leanvit.cli import app
from leanvit.cli.reporting import file_names
from leanvit.count import count
from leanvit.data import data_config, open_data
from leanvit.errors import ConfigError, DataError
from leanvit.explain import Explainer, Explanation, as_seen, class_descriptions, patches_of, trace
from leanvit.model import Tokens
from leanvit.photos import LONGEST_SIDE, in_mode, read_photo
from leanvit.report import figures
from leanvit.store import save

from .everything import Everything

NAMES = [f"kind {index}" for index in range(10)]


@pytest.fixture
def lean(tiny_vit):
    return leanvit.slim(tiny_vit, leanvit.DGSSA(layers=(0, 1)), leanvit.GLAD(at=(2, 3))).eval()


@pytest.fixture
def photo(tmp_path) -> Path:
    return noise(tmp_path / "cat.png")


def noise(path: Path, size: tuple[int, int] = (60, 48), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


class TestExplanation:
    def test_outcomes_are_those_of_the_deployed_models(self, tiny_vit, lean, photo) -> None:
        found = leanvit.explain(lean, photo, class_names=NAMES)
        dense, slim = found.outcomes
        assert (dense.model, slim.model) == ("dense", "lean") and slim.method == str(lean.lean)
        images = open_folder(photo, lean)
        for outcome, model in ((dense, tiny_vit), (slim, leanvit.deploy(lean))):
            probabilities = model(images)[0].softmax(dim=0)
            best = probabilities.topk(5).indices.tolist()
            assert [one.index for one in outcome.top] == best
            assert [one.name for one in outcome.top] == [NAMES[index] for index in best]
            assert outcome.top[0].probability == pytest.approx(probabilities.max().item(), abs=1e-5)
            assert outcome.macs == count(model).macs and outcome.seconds > 0
        assert slim.macs < dense.macs

    def test_blocks_follow_the_tokens(self, lean, photo) -> None:
        found = leanvit.explain(lean, photo)
        assert [block.tokens for block in found.blocks] == [16, 16, 8, 4]
        assert [block.reduced for block in found.blocks] == [False, False, True, True]
        cells = lean.blocks[2].stages["glad"].cells  # fresh GLAD pools neighbours
        assert torch.equal(found.blocks[2].owner, cells)
        assert not found.blocks[3].left_out.any()
        tokens = lean.forward_tokens(open_folder(photo, lean), track=True)
        torch.testing.assert_close(found.blocks[-1].source, tokens.source[0])

    def test_static_beside_dynamic_attention(self, tiny_vit, lean, photo) -> None:
        found = leanvit.explain(lean, photo)
        assert [[one.kind for one in block.maps] for block in found.blocks] == [
            ["static_attention", "dynamic_attention"],
            ["static_attention", "dynamic_attention"],
            [],
            [],
        ]
        static, dynamic = found.blocks[0].maps
        assert static.values.std(dim=-1).max() < 1e-6  # uniform until the warm start
        seen = []
        lean.blocks[0].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            lean(open_folder(photo, lean))
        expected = leanvit.analysis.attention_map(tiny_vit.blocks[0].attn, seen[0])[0]
        torch.testing.assert_close(dynamic.values, expected)
        assert dynamic.around(5, prefix=1).shape == (16,)

    def test_deployed_model_still_shows_what_it_has(self, lean, photo) -> None:
        found = leanvit.explain(leanvit.deploy(lean), photo)
        assert found.dense is None and len(found.outcomes) == 1
        assert [one.kind for one in found.blocks[0].maps] == ["static_attention"]
        assert [block.tokens for block in found.blocks] == [16, 16, 8, 4]

    def test_teacher_with_its_own_size(self, lean, photo) -> None:
        teacher = timm.create_model(
            "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=10
        )
        found = leanvit.explain(leanvit.deploy(lean), photo, teacher=teacher)
        assert found.dense is not None and found.dense.macs == count(teacher).macs

    def test_every_kind(self, tiny_vit, photo) -> None:
        lean = leanvit.slim(tiny_vit, Everything())
        found = leanvit.explain(lean, photo)
        before, after = found.blocks[1], found.blocks[2]
        assert after.tokens == 8 and len(after.maps) == 5
        kept = set(after.owner[after.source.sum(dim=0) > 0].tolist())
        assert kept == set(range(8))
        # Dropped, or of a token that takes no part: three quarters.
        assert int(before.left_out.sum()) == 8 and int(after.left_out.sum()) == 12
        assert after.heads.tolist() == [False, True, False] and after.sublayers.tolist() == [True, False]
        # Every token attends to the next one, and a patch to the patches of that token.
        patch = int((after.owner == 3).nonzero()[0])
        assert set(after.owner[after.maps[0].around(patch, prefix=1) > 0].tolist()) == {4}

    def test_what_does_not_run_uses_nothing(self, tiny_vit, photo) -> None:
        # A decision network decides on heads and patches also of a block that it switches off.
        adapts = leanvit.slim(tiny_vit, leanvit.AdaViT())
        for block, (attention, mlp) in zip(adapts.blocks[1:], [(-9.0, 9.0), (9.0, -9.0), (-9.0, -9.0)], strict=True):
            block.decide.image.weight.data.zero_()
            block.decide.image.bias.data = torch.tensor([9.0, 9.0, 9.0, attention, mlp])
        found = leanvit.explain(adapts, photo).blocks
        assert [block.sublayers.tolist() for block in found[1:]] == [[False, True], [True, False], [False, False]]
        assert [int(block.heads.sum()) for block in found[1:]] == [0, 3, 0]
        assert [int(block.left_out.sum()) for block in found[1:]] == [0, 0, 16]

    def test_what_is_left_out_is_not_attended_to(self, tiny_vit, photo) -> None:
        # A dropped patch belongs to no token; that it is counted to the first must not show.
        pruning = leanvit.TokenPruning(keep=0.5, at=(1,), fuse=False)
        pruned = leanvit.slim(tiny_vit, leanvit.Sparsifiner(keep=1.0), pruning)
        found = leanvit.explain(pruned, photo).blocks[-1]
        (connections,) = found.maps
        assert found.tokens == 8 and int(connections.absent.sum()) == 8
        out = connections.absent
        kept, dropped = int((~out).nonzero()[0]), int(out.nonzero()[0])
        assert torch.equal(connections.around(kept, prefix=1) == 0, out)
        assert not connections.around(dropped, prefix=1).any()

    def test_what_is_merged_is_there(self) -> None:
        # 33 of 64 patches in one token: by their shares alone they would be less than a tenth of the average.
        shares = torch.zeros(32, 64)
        shares[0, :33] = 1 / 33
        shares[1:, 33:] = torch.eye(31)
        fused = Tokens(torch.zeros(1, 33, 8), prefix=1, grid=(8, 8), reduced=True, source=shares[None])
        merged = replace(fused, size=torch.tensor([[1.0, 33.0, *[1.0] * 31]]))
        assert int(patches_of(fused)[1].sum()) == 33 and not patches_of(merged)[1].any()

    def test_training_mode_is_kept(self, lean, photo) -> None:
        lean.train()
        leanvit.explain(lean, photo)
        assert lean.training and lean.blocks[0].attn.training

    def test_json(self, lean, photo) -> None:
        written = json.loads(json.dumps(leanvit.explain(lean, photo, class_names=NAMES).to_json()))
        assert written["photo"] == "cat.png" and written["grid"] == [4, 4]
        assert [block["tokens"] for block in written["blocks"]] == [16, 16, 8, 4]
        assert written["outcomes"][1]["top5"][0]["name"] in NAMES

    def test_query(self, lean, photo) -> None:
        assert leanvit.explain(lean, photo, query=(3, 1)).query == 7
        with pytest.raises(ConfigError, match=r"query 4,0 lies outside the patches: columns go from 0 to 3"):
            leanvit.explain(lean, photo, query=(4, 0))

    def test_refuses_a_dense_model(self, tiny_vit, photo) -> None:
        with pytest.raises(ConfigError, match="the model to explain is a dense VisionTransformer"):
            leanvit.explain(tiny_vit, photo)

    def test_refuses_a_teacher_of_other_classes(self, lean, photo) -> None:
        teacher = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_classes=3
        )
        with pytest.raises(ConfigError, match="the teacher has 3 classes, the lean model 10"):
            leanvit.explain(lean, photo, teacher=teacher)


class TestFigures:
    def test_only_what_there_is_to_draw(self, tiny_vit, lean, photo) -> None:
        assert set(leanvit.explain(lean, photo).figures()) == {"predictions", "tokens", "attention"}
        assert set(leanvit.explain(leanvit.slim(tiny_vit), photo).figures()) == {"predictions"}
        everything = leanvit.explain(leanvit.slim(tiny_vit, Everything()), photo).figures()
        assert set(everything) == set(figures.ABOUT)

    def test_panels_say_what_became_of_the_patches(self, tiny_vit, lean, photo) -> None:
        drawn = leanvit.explain(lean, photo).figures()["tokens"]
        titles = [axes.get_title(loc="left") for axes in drawn.axes if axes.images]
        assert titles == ["16 patches", "block 2: 8 tokens", "block 3: 4 tokens"]
        everything = leanvit.explain(leanvit.slim(tiny_vit, Everything()), photo).figures()["tokens"]
        titles = [axes.get_title(loc="left") for axes in everything.axes if axes.images]
        assert titles == ["16 patches", "block 0: 8 of 16 left out", "block 2: 8 tokens, 12 left out"]

    def test_each_says_what_it_shows(self, tiny_vit, photo) -> None:
        for name, figure in leanvit.explain(leanvit.slim(tiny_vit, Everything()), photo).figures().items():
            assert figure.get_suptitle().replace("\n", " ") == figures.ABOUT[name]

    def test_patches_of_a_token_take_on_its_mean_colour(self, lean, tmp_path) -> None:
        halves = Image.new("RGB", (64, 64), "black")
        halves.paste("white", (0, 0, 64, 32))
        halves.save(tmp_path / "halves.png")
        panel = leanvit.explain(lean, tmp_path / "halves.png").figures()["tokens"].axes[2]  # squares of 2×2 patches
        tint = panel.images[1].get_array()
        assert tint.shape == (4, 4, 4) and (tint[..., 3] == figures.TINT).all()
        np.testing.assert_allclose(tint[:2, :, :3], 1.0, atol=0.05)
        np.testing.assert_allclose(tint[2:, :, :3], 0.0, atol=0.05)

    def test_borders_lie_between_tokens(self, lean, photo) -> None:
        found = leanvit.explain(lean, photo)
        panel = found.figures()["tokens"].axes[2]  # four tokens: a 2×2 grid of squares of 2×2 patches
        width, height = found.photo.size
        lines = np.array(panel.collections[0].get_segments()) + 0.5
        assert len(lines) == 8
        assert all((line[:, 0] == width / 2).all() or (line[:, 1] == height / 2).all() for line in lines)

    def test_shows_itself_in_a_notebook(self, lean, photo) -> None:
        page = leanvit.explain(lean, photo)._repr_html_()
        assert page.count("data:image/png;base64,") == 3 and page.count("alt=") == 3 and "http" not in page


class TestPhotos:
    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
    def test_modes(self, lean, tmp_path, mode) -> None:
        found = leanvit.explain(lean, noise(tmp_path / "photo.png", mode=mode))
        assert found.photo.mode == "RGB"

    def test_sixteen_bits_are_scaled(self, tmp_path) -> None:
        ramp = np.linspace(0, 65535, 48 * 60).reshape(48, 60)
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
        grey = np.asarray(read_photo(tmp_path / "deep.png", "L"), dtype=float)
        np.testing.assert_allclose(grey, ramp / 257, atol=0.51)
        wide = (
            in_mode(Image.fromarray(ramp.astype(np.int32)), "RGB"),
            in_mode(Image.fromarray(ramp.astype(np.float32) / 65535), "RGB"),
        )
        for image in wide:
            np.testing.assert_allclose(np.asarray(image)[..., 0], ramp / 257, atol=0.51)

    def test_sixteen_bits_in_a_data_set(self, tiny_vit, tmp_path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.fromarray(np.full((40, 40), 20000, dtype=np.uint16)).save(tmp_path / name / "deep.png")
        images = open_data(tmp_path, tiny_vit, num_classes=2)
        assert float(images[0][0].max()) < 0  # darker than the middle, and not clipped to white

    def test_huge_photo_is_made_smaller(self, lean, tmp_path) -> None:
        Image.new("RGB", (9000, 12000), "teal").save(tmp_path / "huge.jpg")
        assert max(read_photo(tmp_path / "huge.jpg").size) <= LONGEST_SIDE
        small = as_seen(Image.new("RGB", (90, 120)), data_config(lean))
        assert leanvit.explain(lean, tmp_path / "huge.jpg").photo.size == small.size

    def test_more_pixels_than_safe(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match=r"cat\.png has too many pixels to be read safely .*make it smaller"):
            read_photo(noise(tmp_path / "cat.png"))

    def test_upright(self, tmp_path) -> None:
        image = Image.new("RGB", (60, 40))
        exif = image.getexif()
        exif[0x0112] = 6  # taken with the camera on its side
        image.save(tmp_path / "side.jpg", exif=exif)
        assert read_photo(tmp_path / "side.jpg").size == (40, 60)

    def test_shown_as_the_model_sees_it(self, tiny_vit, tmp_path) -> None:
        # A wide photo, blue at both ends: the model crops to the middle, and so does the picture.
        image = Image.new("RGB", (300, 100), "blue")
        image.paste("white", (90, 0, 210, 100))
        shown = np.asarray(as_seen(image, data_config(tiny_vit)))
        assert shown.shape[0] == shown.shape[1] >= 448 and shown.min() > 250

    def test_no_image(self, lean, tmp_path) -> None:
        (tmp_path / "notes.jpg").write_text("not a photo")
        with pytest.raises(DataError, match=r"notes\.jpg is no image that can be read: UnidentifiedImageError"):
            leanvit.explain(lean, tmp_path / "notes.jpg")
        whole = noise(tmp_path / "cat.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"cut\.png is no image that can be read"):
            leanvit.explain(lean, tmp_path / "cut.png")
        with pytest.raises(DataError, match=r"no such photo: .*gone\.jpg"):
            leanvit.explain(lean, tmp_path / "gone.jpg")
        with pytest.raises(DataError, match=r"is a folder; give image files"):
            leanvit.explain(lean, tmp_path)


class TestClassNames:
    def test_where_they_come_from(self, tiny_vit, tmp_path) -> None:
        assert class_descriptions(tiny_vit)[3] == "class 3"
        tiny_vit.pretrained_cfg = {**tiny_vit.pretrained_cfg, "label_names": ["n01440764", "n99999999", *NAMES[2:]]}
        assert class_descriptions(tiny_vit)[:3] == ["tench", "n99999999", "kind 2"]
        (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)) + "\n")
        assert class_descriptions(tiny_vit, tmp_path / "names.txt")[0] == "kind 9"

    def test_imagenet(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=12, depth=1)
        assert class_descriptions(model)[3] == "tiger shark"

    def test_missing_list(self, tiny_vit, tmp_path) -> None:
        with pytest.raises(DataError, match=r"the class names in .*names\.txt cannot be read"):
            class_descriptions(tiny_vit, tmp_path / "names.txt")
        with pytest.raises(ConfigError, match="2 class names for a model of 10 classes"):
            class_descriptions(tiny_vit, ["cat", "dog"])


class TestCommand:
    @pytest.fixture
    def run(self, lean, tmp_path) -> Path:
        return save(lean, tmp_path / "run" / "best", class_names=NAMES).parent

    def explain(self, *arguments: object):
        return CliRunner().invoke(app, ["explain", *map(str, arguments)])

    def test_writes_pictures_and_figures(self, run, photo, tmp_path) -> None:
        (tmp_path / "other").mkdir()
        again = noise(tmp_path / "other" / "cat.png")
        out = tmp_path / "out"
        result = self.explain(photo, again, "--model", run, "--output", out, "--query", "1,2")
        assert result.exit_code == 0, result.output
        names = [f"{cat}-{figure}.png" for cat in ("cat", "cat-2") for figure in ("attention", "predictions", "tokens")]
        assert sorted(path.name for path in out.iterdir()) == sorted([*names, "explained.json"])
        assert all(Image.open(out / name).width > 300 for name in names)
        written = json.loads((out / "explained.json").read_text())
        assert len(written["photos"]) == 2 and written["environment"]["processor"]
        assert "kind" in result.output

    def test_refuses_to_replace(self, run, photo, tmp_path) -> None:
        out = tmp_path / "out"
        assert self.explain(photo, "--model", run, "--output", out).exit_code == 0
        result = self.explain(photo, "--model", run, "--output", out)
        assert (
            result.exit_code == 2
            and "holds explained.json already; give another --output, or --overwrite" in result.output
        )
        assert self.explain(photo, "--model", run, "--output", out, "--overwrite").exit_code == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--query", "middle"], "query 'middle' is not of the form X,Y"),
            (["--query", "9,9"], "query 9,9 lies outside the patches"),
            (["--class-map", "no-such-file.txt"], "the class names in no-such-file.txt cannot be read"),
            (["--output", "{photo}"], "is a file; give a folder"),
        ],
    )
    def test_bad_options(self, run, photo, tmp_path, arguments, message) -> None:
        arguments = [text.format(photo=photo) for text in arguments]
        result = self.explain(photo, "--model", run, "--output", tmp_path / "out", *arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split())
        assert not (tmp_path / "out").exists()

    def test_a_file_that_is_no_image(self, run, photo, tmp_path) -> None:
        (tmp_path / "notes.txt").write_text("not a photo")
        result = self.explain(photo, tmp_path / "notes.txt", "--model", run, "--output", tmp_path / "out")
        assert result.exit_code == 2 and "notes.txt is no image that can be read" in result.output
        assert not (tmp_path / "out").exists()


def open_folder(photo: Path, model) -> torch.Tensor:
    """The photo as the data loader would give it, ``(1, 3, H, W)``."""
    transform = timm.data.create_transform(**data_config(model))
    return transform(Image.open(photo).convert("RGB"))[None]


def test_pictures_of_photos_have_names_of_their_own():
    photos = [Path("a.jpg"), Path("x/a.jpg"), Path("a-2.jpg")]
    assert file_names(photos) == ["a", "a-2", "a-2-2"]


def test_one_explainer_for_many_photos(lean, photo, tmp_path) -> None:
    explainer = Explainer(lean, class_names=NAMES, rounds=2)
    first, second = explainer(photo, label=3), explainer(Image.open(photo), name="again")
    assert isinstance(first, Explanation) and first.label == "kind 3" and second.label is None
    assert (first.name, second.name) == ("cat.png", "again")
    assert torch.equal(first.blocks[-1].source, second.blocks[-1].source)
    assert len(trace(lean, open_folder(photo, lean))) == 4
