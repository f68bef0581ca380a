from __future__ import annotations

import io
import json
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from leanvit import data
from leanvit.data import data_config, image_batches, labelled, loader, open_data, open_held_out, report_damage
from leanvit.errors import ConfigError, DataError, InputSizeError


def picture(seed: int, size: tuple[int, int] = (40, 48), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(classes: int = 10, each: int = 2, name: str = "photos") -> Path:
        for index in range(classes):
            folder = tmp_path / name / f"class{index}"
            folder.mkdir(parents=True)
            for number in range(each):
                (folder / f"{number}.jpg").write_bytes(encoded(100 * index + number))
        return tmp_path / name

    return make


def pack(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.rglob("*.jpg")):
            tar.add(path, path.relative_to(folder))
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class TestOpening:
    def test_folder_and_tar_give_the_same(self, make_folder, tmp_path, tiny_vit) -> None:
        folder = make_folder()
        from_folder, from_tar = (
            open_data(folder, tiny_vit),
            open_data(pack(folder, tmp_path / "a.tar"), tiny_vit),
        )
        assert len(from_folder) == len(from_tar) == 20
        assert from_folder.classes == from_tar.classes == [f"class{index}" for index in range(10)]
        for (image, label), (other, other_label) in zip(from_folder, from_tar, strict=True):
            assert label == other_label
            torch.testing.assert_close(image, other)

    def test_labels_follow_the_natural_order_of_the_folders(self, make_folder) -> None:
        dataset = open_data(make_folder(classes=11))
        assert dataset.classes[2] == "class2" and dataset.classes[10] == "class10"
        assert [label for _, label in dataset] == [index for index in range(11) for _ in range(2)]

    def test_preprocessing_is_the_models(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        transform = timm.data.create_transform(
            (3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, interpolation="bicubic"
        )
        with Image.open(folder / "class0" / "0.jpg") as image:
            expected = transform(image)
        torch.testing.assert_close(open_data(folder, tiny_vit)[0][0], expected)

    def test_training_augments(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        plain, augmented = open_data(folder, tiny_vit), open_data(folder, tiny_vit, training=True)
        assert augmented[0][0].shape == (3, 32, 32)
        assert not torch.equal(augmented[0][0], plain[0][0])
        still = open_data(
            folder,
            tiny_vit,
            training=True,
            augment={"hflip": 0.0, "color_jitter": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
        )
        assert torch.equal(still[0][0], still[0][0])

    def test_own_transform(self, make_folder) -> None:
        assert open_data(make_folder(), transform=lambda image: image.size)[0] == ((40, 48), 0)

    def test_grey_and_palette_images_come_out_in_colour(self, tmp_path, tiny_vit) -> None:
        for mode, suffix in (("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png")):
            (tmp_path / mode).mkdir()
            picture(0, mode=mode).save(tmp_path / mode / f"x.{suffix}")
        dataset = open_data(tmp_path, tiny_vit, num_classes=4)
        assert {tuple(image.shape) for image, _ in dataset} == {(3, 32, 32)}

    def test_unknown_augmentation(self, make_folder, tiny_vit) -> None:
        with pytest.raises(ConfigError, match=r"does not know this augmentation.*sparkle"):
            open_data(make_folder(), tiny_vit, training=True, augment={"sparkle": 1})

    @pytest.mark.parametrize("augment", [{"auto_augment": "foo"}, {"color_jitter": -1.0}, {"hflip": "x"}])
    def test_augmentation_that_timm_refuses(self, augment, make_folder, tiny_vit) -> None:
        with pytest.raises(ConfigError, match="timm does not know this augmentation"):
            open_data(make_folder(), tiny_vit, training=True, augment=augment)

    @pytest.mark.parametrize("path", ["nowhere", "nowhere/x.tar"])
    def test_missing(self, path, tmp_path) -> None:
        with pytest.raises(DataError, match=r"no such file or folder.*nowhere"):
            open_data(tmp_path / path)

    def test_empty_folder(self, tmp_path) -> None:
        with pytest.raises(DataError, match="no images in "):
            open_data(tmp_path)

    def test_empty_tar(self, tmp_path) -> None:
        with pytest.raises(DataError, match=r"no images in .*a\.tar"):
            open_data(pack(tmp_path, tmp_path / "a.tar"))

    def test_no_tar_inside(self, tmp_path) -> None:
        (tmp_path / "a.tar").write_bytes(b"this is no archive" * 100)
        with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar file"):
            open_data(tmp_path / "a.tar")

    def test_truncated_tar(self, make_folder, tmp_path) -> None:
        truncate(pack(make_folder(), tmp_path / "a.tar"))
        with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar file"):
            open_data(tmp_path / "a.tar")

    def test_other_file(self, tmp_path) -> None:
        (tmp_path / "a.zip").touch()
        with pytest.raises(DataError, match=r"a\.zip is neither a folder nor a \.tar"):
            open_data(tmp_path / "a.zip")

    def test_streams_are_refused(self) -> None:
        with pytest.raises(DataError, match="tfds/mnist is a stream"):
            open_data("tfds/mnist")


class TestSplits:
    def test_divided_folder(self, make_folder) -> None:
        make_folder(each=3, name="root/train")
        root = make_folder(each=1, name="root/validation").parent
        assert len(open_data(root, training=True)) == 30
        assert len(open_data(root)) == len(open_data(root, split="val")) == 10
        assert len(open_data(root, split="train")) == 30

    def test_a_split_can_be_a_tar(self, make_folder, tmp_path) -> None:
        pack(make_folder(each=1), tmp_path / "some.tar")
        assert len(open_data(tmp_path, split="some.tar")) == 10

    def test_a_class_may_be_called_train(self, tmp_path) -> None:
        for name in ("bus", "train"):
            (tmp_path / name).mkdir()
            picture(0).save(tmp_path / name / "x.png")
        assert open_data(tmp_path, training=True).classes == ["bus", "train"]

    def test_other_folders_beside_both_splits(self, make_folder) -> None:
        make_folder(name="root/train")
        root = make_folder(name="root/val").parent
        (root / "annotations").mkdir()
        with pytest.raises(DataError, match=r"holds splits and other folders \(annotations\); name the split"):
            open_data(root, training=True)
        assert len(open_data(root, split="val")) == 20

    def test_unknown_split(self, make_folder) -> None:
        with pytest.raises(DataError, match="has no split 'val'; it holds class0, class1"):
            open_data(make_folder(), split="val")

    def test_missing_half(self, make_folder) -> None:
        root = make_folder(name="root/train").parent
        with pytest.raises(DataError, match="has no split 'val'; it holds train"):
            open_data(root)
        assert open_held_out(str(root)) is None


class TestClasses:
    def test_folders_that_do_not_match(self, make_folder, tiny_vit) -> None:
        with pytest.raises(DataError, match=r"has 3 classes \(class0, class1, class2\), the model has 10"):
            open_data(make_folder(classes=3), tiny_vit)

    def test_number_of_classes_without_a_model(self, make_folder) -> None:
        with pytest.raises(DataError, match=r"has 10 classes .*, the model has 4"):
            open_data(make_folder(), num_classes=4)

    def test_no_folders_of_classes(self, make_folder, tiny_vit) -> None:
        one_class = make_folder() / "class0"
        with pytest.raises(DataError, match=r"images of .*class0 have no labels"):
            open_data(one_class, tiny_vit)
        assert len(open_data(one_class)) == 2, "they do where no labels are asked for"

    def test_names_that_the_model_knows(self, make_folder, tiny_vit) -> None:
        names = [f"class{index}" for index in reversed(range(10))]
        tiny_vit.pretrained_cfg["label_names"] = names
        dataset = open_data(make_folder(classes=3), tiny_vit)  # three of the ten are enough
        assert dataset.classes == names
        assert [label for _, label in dataset] == [9, 9, 8, 8, 7, 7]

    def test_names_that_the_model_does_not_know(self, make_folder, tiny_vit) -> None:
        tiny_vit.pretrained_cfg["label_names"] = [f"kind{index}" for index in range(10)]
        with pytest.raises(DataError, match=r"'class0' is none of the model's 10 classes \(kind0"):
            open_data(make_folder(), tiny_vit)

    def test_synsets_of_a_thousand_classes(self, tmp_path) -> None:
        synsets = ImageNetInfo().label_names()
        for index in (0, 500, 999):
            (tmp_path / synsets[index]).mkdir()
            picture(index).save(tmp_path / synsets[index] / "x.png")
        dataset = open_data(tmp_path, num_classes=1000)
        assert [label for _, label in dataset] == [0, 500, 999]
        assert dataset.classes == synsets

    def test_synset_that_imagenet_1k_has_not(self, tmp_path) -> None:
        (tmp_path / "n00000001").mkdir()
        picture(0).save(tmp_path / "n00000001" / "x.png")
        with pytest.raises(DataError, match="'n00000001' is none of the model's 1000 classes"):
            open_data(tmp_path, num_classes=1000)

    def test_class_map(self, make_folder, tmp_path, tiny_vit) -> None:
        folder = make_folder()
        dataset = open_data(folder, tiny_vit, class_map={"class3": 0, "class1": 7})
        assert [label for _, label in dataset] == [7, 7, 0, 0]
        assert dataset.classes == []
        (tmp_path / "map.txt").write_text("class1\nclass0\n")
        assert open_data(folder, tiny_vit, class_map=str(tmp_path / "map.txt")).classes == [
            "class1",
            "class0",
        ]

    def test_class_map_of_any_ending_with_blank_lines(self, make_folder, tmp_path) -> None:
        (tmp_path / "names").write_text("\ufeffclass1\n\n class0 \n\n", encoding="utf-8")
        assert open_data(make_folder(), class_map=str(tmp_path / "names")).classes == ["class1", "class0"]

    @pytest.mark.parametrize(("text", "problem"), [("a\nb\na\n", "names 'a' twice"), ("\n", "is empty")])
    def test_class_map_without_sense(self, text, problem, make_folder, tmp_path) -> None:
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(DataError, match=f"class map .*map.txt {problem}"):
            open_data(make_folder(), class_map=str(tmp_path / "map.txt"))

    def test_class_map_beyond_the_model(self, make_folder, tiny_vit) -> None:
        with pytest.raises(DataError, match="class map goes up to label 10, the model has 10 classes"):
            open_data(make_folder(), tiny_vit, class_map={"class0": 10})

    def test_class_map_of_other_classes(self, make_folder, tiny_vit) -> None:
        with pytest.raises(DataError, match="no images of the classes in the class map"):
            open_data(make_folder(), tiny_vit, class_map={"dog": 0})

    def test_missing_class_map(self, make_folder, tiny_vit) -> None:
        with pytest.raises(DataError, match=r"no such class map: nowhere\.txt"):
            open_data(make_folder(), tiny_vit, class_map="nowhere.txt")

    def test_class_map_without_names(self, tiny_vit) -> None:
        with pytest.raises(ConfigError, match="digits: a class map is for named classes"):
            open_data("digits", tiny_vit, class_map={"0": 1})


class TestDigits:
    def test_division_is_fixed_and_even(self) -> None:
        train, val = open_data("digits", split="train"), open_data("digits", split="val")
        assert len(train) == 1437 and len(val) == 360
        assert not set(train.reader.indices) & set(val.reader.indices)
        assert torch.bincount(torch.tensor([label for _, label in val])).min() >= 34
        assert val.reader.indices == open_data("digits").reader.indices
        assert train.reader.indices == open_data("digits", training=True).reader.indices

    def test_pixels_are_scikit_learns(self) -> None:
        from sklearn.datasets import load_digits

        dataset = open_data("digits")
        image, label = dataset[5]
        index = dataset.reader.indices[5]
        digits = load_digits()
        assert label == digits.target[index]
        torch.testing.assert_close(image, torch.tensor(digits.images[index] / 8 - 1)[None].float(), atol=0.005, rtol=0)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_channels_and_size_of_the_model(self, channels) -> None:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, in_chans=channels, num_classes=10
        )
        for training in (False, True):
            assert open_data("digits", model, training=training)[0][0].shape == (channels, 16, 16)

    def test_unknown_split(self) -> None:
        with pytest.raises(DataError, match="digits has no split 'letters'; it has train and val"):
            open_data("digits", split="letters")


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path) -> Path:
        for number in range(2):
            with tarfile.open(tmp_path / f"train-000{number}.tar", "w") as tar:
                for index in range(3):
                    self.add(tar, f"{number}/{index:04}.jpg", encoded(10 * number + index))
                    self.add(tar, f"{number}/{index:04}.cls", str(3 * number + index).encode())
        return tmp_path

    @staticmethod
    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    @pytest.mark.parametrize("pattern", ["", "/train-{0000..0001}.tar", "/train-*.tar", "/train-000{0..1}.tar"])
    def test_patterns(self, shards, pattern, tiny_vit) -> None:
        dataset = open_data(f"wds/{shards}{pattern}", tiny_vit)
        assert [label for _, label in dataset] == [0, 1, 2, 3, 4, 5]
        assert dataset.reader.filename(4) == "train-0001.tar/1/0001.jpg"

    def test_splits(self, shards) -> None:
        listed = {"splits": {"small": {"filenames": ["train-0001.tar"]}}}
        (shards / "_info.json").write_text(json.dumps(listed))
        assert [label for _, label in open_data(f"wds/{shards}", split="small")] == [3, 4, 5]
        assert len(open_data(f"wds/{shards}", split="train")) == 6
        assert len(open_data(f"wds/{shards}", split="train-{0000..0000}.tar|3")) == 3

    def test_workers_read_the_same(self, shards, tiny_vit) -> None:
        dataset = open_data(f"wds/{shards}", tiny_vit)
        alone, together = (list(loader(dataset, 2, workers=workers)) for workers in (0, 2))
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other)

    def test_label_beyond_the_model(self, shards) -> None:
        dataset = open_data(f"wds/{shards}", num_classes=5)
        for workers in (0, 1):
            with pytest.raises(
                DataError, match=r"^train-0001\.tar/1/0002\.jpg in .* has label 5, none of the model's 5"
            ):
                list(loader(dataset, 2, workers=workers))

    def test_no_shards(self, tmp_path) -> None:
        with pytest.raises(DataError, match="no WebDataset shards at"):
            open_data(f"wds/{tmp_path}")

    def test_missing_shard(self, shards) -> None:
        with pytest.raises(DataError, match=r"no such shard: .*train-0002\.tar"):
            open_data(f"wds/{shards}/train-{{0000..0002}}.tar")

    def test_damaged_shard(self, shards) -> None:
        (shards / "train-0000.tar").write_bytes(b"no tar" * 500)
        with pytest.raises(DataError, match=r"train-0000\.tar cannot be read as a WebDataset shard"):
            open_data(f"wds/{shards}")

    @pytest.mark.parametrize("text", ["{bad", "[]", '{"splits": {"train": []}}'])
    def test_damaged_list_of_shards(self, shards, text) -> None:
        (shards / "_info.json").write_text(text)
        with pytest.raises(DataError, match=r"_info\.json does not list shards by split"):
            open_data(f"wds/{shards}", split="train")

    def test_image_without_label(self, tmp_path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            self.add(tar, "7.jpg", encoded(0))
        with pytest.raises(DataError, match=r"7\.jpg in .*a\.tar has no label: 7\.cls is missing"):
            open_data(f"wds/{tmp_path}")


class TestHuggingFace:
    @pytest.fixture
    def datasets(self, monkeypatch) -> types.ModuleType:
        """A stand-in for the package `datasets`, as far as timm's reader uses it."""

        class Stored(list):
            label = types.SimpleNamespace(names=["cat", "dog"], str2int=["cat", "dog"].index)
            sizes = types.SimpleNamespace(num_examples=2)
            info = types.SimpleNamespace(features={"label": label}, splits={"train": sizes, "validation": sizes})

            def cast_column(self, *_):
                return self

        def load_dataset(name, split, **_):
            if name == "nobody/nothing":
                raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist")
            return Stored({"image": {"bytes": encoded(index), "path": None}, "label": index} for index in range(2))

        module = types.ModuleType("datasets")
        module.load_dataset, module.Image = load_dataset, lambda decode: None
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
        return module

    def test_images_labels_and_names(self, datasets) -> None:
        dataset = open_data("hfds/owner/pets", num_classes=2)
        assert dataset.classes == ["cat", "dog"]
        assert [label for _, label in dataset] == [0, 1]

    def test_missing(self, datasets) -> None:
        with pytest.raises(DataError, match=r"hfds/nobody/nothing, split 'validation': .*doesn't exist"):
            open_data("hfds/nobody/nothing")

    def test_package_missing(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
        with pytest.raises(DataError, match="needs the package datasets"):
            open_data("hfds/owner/pets")


class TestDamage:
    def test_skipped_counted_and_named(self, make_folder, tiny_vit) -> None:
        folder = make_folder(each=2)
        truncate(folder / "class4" / "1.jpg")
        dataset = open_data(folder, tiny_vit)
        labels = torch.cat([labels for _, labels in loader(dataset, 4)]).tolist()
        assert labels == sorted([*range(10), *range(10)])[:9] + sorted([*range(10), *range(10)])[10:]
        assert dataset.damaged == ["class4/1.jpg"]
        assert report_damage(Subset(dataset, [0])) == (
            f"1 of the 20 images in {folder} are damaged and were skipped: class4/1.jpg"
        )

    def test_nothing_to_report(self, make_folder) -> None:
        assert report_damage(open_data(make_folder())) == report_damage(TensorDataset(torch.zeros(1))) == ""

    @pytest.mark.parametrize("content", [b"", b"not an image", encoded(0)[:200], b"\x89PNG\r\n\x1a\n" + bytes(50)])
    def test_kinds_of_damage(self, make_folder, content) -> None:
        folder = make_folder()
        (folder / "class0" / "0.jpg").write_bytes(content)
        dataset = open_data(folder)
        assert dataset[0] is None and dataset[1] is not None
        assert dataset.damaged == ["class0/0.jpg"]

    def test_found_by_workers_and_once_over_epochs(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        truncate(folder / "class7" / "0.jpg")
        dataset = open_data(folder, tiny_vit)
        for _ in range(2):
            assert sum(len(images) for images, _ in loader(dataset, 3, workers=2)) == 19
        assert dataset.damaged == ["class7/0.jpg"]

    def test_in_a_tar(self, make_folder, tmp_path) -> None:
        folder = make_folder()
        truncate(folder / "class7" / "0.jpg")
        dataset = open_data(pack(folder, tmp_path / "a.tar"))
        assert dataset[14] is None and dataset.damaged == ["class7/0.jpg"]

    def test_a_batch_can_come_out_empty(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        truncate(folder / "class0" / "0.jpg")
        sizes = [len(images) for images, _ in loader(open_data(folder, tiny_vit), 1)]
        assert sizes == [0] + [1] * 19

    def test_a_batch_can_be_filled_again(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        truncate(folder / "class0" / "0.jpg")
        (images, labels), *others = loader(open_data(folder, tiny_vit), 1, refill=True)
        assert len(others) == 19 and torch.equal(images, others[0][0]) and torch.equal(labels, others[0][1])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_too_much_stops(self, make_folder, tiny_vit, workers) -> None:
        folder = make_folder()
        truncate(folder / "class2" / "1.jpg")
        truncate(folder / "class3" / "0.jpg")
        match = r"^2 of the 20 images in .* are damaged, over 1%; the last is class3/0\.jpg: OSError: .*truncated"
        with pytest.raises(DataError, match=match) as caught:
            list(loader(open_data(folder, tiny_vit), 4, workers=workers))
        assert "\n" not in str(caught.value)

    def test_the_limit_is_one_percent(self, monkeypatch) -> None:
        class Reader:
            def __len__(self):
                return 300

            def __getitem__(self, index):
                raise OSError("gone")

            def filename(self, index, **_):
                return str(index)

        dataset = data.ImageData(Reader(), "here", lambda image: image)
        assert [dataset[index] for index in (0, 1, 2, 2)] == [None] * 4  # 1 %, one of them met twice
        with pytest.raises(DataError, match="4 of the 300 images"):
            dataset[3]

    def test_a_transform_that_fails_is_no_damage(self, make_folder) -> None:
        def fail(image):
            raise ValueError("a bug")

        with pytest.raises(ValueError, match="a bug"):
            open_data(make_folder(), transform=fail)[0]


class TestLoader:
    def test_same_seed_same_order(self) -> None:
        dataset = TensorDataset(torch.arange(50))

        def order(seed: int) -> list[int]:
            return torch.cat([batch for (batch,) in loader(dataset, 8, shuffle=True, seed=seed)]).tolist()

        assert order(1) == order(1) != order(2)
        assert sorted(order(1)) == list(range(50))

    def test_augmentation_in_workers_is_deterministic(self, make_folder, tiny_vit) -> None:
        dataset = open_data(make_folder(), tiny_vit, training=True)
        first, second = (torch.cat([images for images, _ in loader(dataset, 5, workers=1)]) for _ in range(2))
        assert torch.equal(first, second)

    def test_a_tar_that_was_read_before_the_workers_started(self, make_folder, tmp_path, tiny_vit) -> None:
        dataset = open_data(pack(make_folder(each=5), tmp_path / "a.tar"), tiny_vit)
        alone = torch.cat([images for images, _ in loader(dataset, 5)])
        together = torch.cat([images for images, _ in loader(dataset, 5, workers=2)])
        assert torch.equal(alone, together)


class TestLabelled:
    def test_any_integers_for_labels(self) -> None:
        images, labels = labelled([torch.zeros(2, 3, 8, 8), torch.tensor([1, 0], dtype=torch.int32)])
        assert images.shape == (2, 3, 8, 8) and labels.dtype is torch.int64

    @pytest.mark.parametrize(
        ("batch", "match"),
        [
            ({"image": torch.zeros(2, 3, 8, 8)}, r"a pair \(images, labels\) of tensors, not a dict"),
            (torch.zeros(2, 3, 8, 8), r"a pair .*, not a tensor of shape \(2, 3, 8, 8\), torch\.float32"),
            ([torch.zeros(2, 3, 8, 8), torch.zeros(2), ["a", "b"]], r"not a list of \(Tensor, Tensor, list\)"),
            ([torch.zeros(2, 3, 8, 8), ["a", "b"]], r"labels are class indices, .*not a list of \(str, str\)"),
            ([torch.zeros(2, 3, 8, 8), torch.ones(2)], r"labels are .* not a tensor of shape \(2,\), torch\.float32"),
            ([torch.zeros(2, 3, 8, 8), torch.eye(2)], r"labels are .* not a tensor of shape \(2, 2\)"),
        ],
    )
    def test_what_is_no_labelled_batch(self, batch, match) -> None:
        with pytest.raises(DataError, match=match):
            labelled(batch)


class TestDataConfig:
    def test_size_and_channels_are_those_of_now(self) -> None:
        model = timm.create_model("deit_tiny_patch16_224", img_size=160, in_chans=1, depth=1)
        config = data_config(model)
        assert config["input_size"] == (1, 160, 160)
        assert config["mean"] == pytest.approx((0.449,), abs=1e-6) and len(config["std"]) == 1
        model.set_input_size(img_size=(96, 128))
        assert data_config(model)["input_size"] == (1, 96, 128)

    def test_impossible_channels(self, make_folder) -> None:
        model = timm.create_model("deit_tiny_patch16_224", in_chans=5, depth=1, num_classes=10)
        with pytest.raises(ConfigError, match="the model takes 5 channels; images have 1, 3 or 4"):
            open_data(make_folder(), model)


class TestImageBatches:
    def test_every_kind_of_source_gives_the_same(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        dataset = open_data(folder, tiny_vit)
        images = torch.stack([image for image, _ in dataset])
        for source in (folder, str(folder), dataset, loader(dataset, 8), DataLoader(images, 8), images):
            batches = list(image_batches(source, tiny_vit, 8))
            assert [len(batch) for batch in batches] == [8, 8, 4]
            torch.testing.assert_close(torch.cat(batches), images)

    def test_limit_is_spread_evenly(self, tiny_vit) -> None:
        images = torch.arange(20.0).reshape(20, 1, 1, 1).expand(20, 3, 32, 32)

        def taken(source, limit):
            return torch.cat(list(image_batches(source, tiny_vit, 2, limit=limit)))[:, 0, 0, 0].tolist()

        for source in (images, TensorDataset(images)):
            assert taken(source, 5) == [0, 4, 8, 12, 16]
        assert taken(DataLoader(images, 4), 6) == [*range(6)]
        assert sum(map(len, image_batches(images, tiny_vit, 8, limit=99))) == 20

    def test_no_labels_needed(self, tmp_path, tiny_vit) -> None:
        for index in range(3):
            picture(index).save(tmp_path / f"{index}.png")
        assert [batch.shape for batch in image_batches(tmp_path, tiny_vit, 2)] == [
            (2, 3, 32, 32),
            (1, 3, 32, 32),
        ]

    def test_of_splits_the_one_for_training(self, make_folder, tiny_vit) -> None:
        make_folder(each=1, name="root/val")
        root = make_folder(each=2, name="root/train").parent
        assert sum(map(len, image_batches(root, tiny_vit, 8))) == 20

    def test_damage_is_named_in_a_warning(self, make_folder, tiny_vit) -> None:
        folder = make_folder()
        truncate(folder / "class0" / "0.jpg")
        with pytest.warns(UserWarning, match=r"1 of the 20 images in .* class0/0\.jpg"):
            assert sum(map(len, image_batches(folder, tiny_vit, 1))) == 19

    @pytest.mark.parametrize(
        ("source", "match"),
        [
            (torch.empty(0, 3, 32, 32), "there are no images"),
            (torch.zeros(3, 32, 32), r"shape \(B, C, H, W\), not \(3, 32, 32\)"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"images are floating point, .*not torch\.uint8"),
            (7, "given as a path, a data set, a loader or a tensor, not a int"),
        ],
    )
    def test_no_images(self, source, match, tiny_vit) -> None:
        with pytest.raises(DataError, match=match):
            list(image_batches(source, tiny_vit, 4))

    @pytest.mark.parametrize(
        ("samples", "match"),
        [
            ([{"image": torch.zeros(3, 32, 32)}] * 2, "a batch is images, or starts with them, .* this one is a dict"),
            ([picture(0)], "images cannot be put into a batch: .*PIL.Image.Image"),
            ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 24)], "images cannot be put into a batch: .*equal size"),
        ],
    )
    def test_a_data_set_of_something_else(self, samples, match, tiny_vit) -> None:
        class Samples(Dataset):
            def __len__(self):
                return len(samples)

            def __getitem__(self, index):
                return samples[index]

        with pytest.raises(DataError, match=match):
            list(image_batches(Samples(), tiny_vit, 4))

    def test_other_channels_than_the_models(self, tiny_vit) -> None:
        with pytest.raises(InputSizeError, match="the images have 1 channels, the model takes 3"):
            list(image_batches(torch.zeros(1, 1, 32, 32), tiny_vit, 4))

    def test_images_of_numpys_precision(self, tiny_vit) -> None:
        (batch,) = image_batches(torch.from_numpy(np.zeros((2, 3, 32, 32))), tiny_vit, 4)
        assert batch.dtype is torch.float32

    def test_limit_must_be_positive(self, tiny_vit) -> None:
        with pytest.raises(ConfigError, match="limit=0 is not positive"):
            list(image_batches(torch.zeros(1, 3, 32, 32), tiny_vit, 4, limit=0))


class TestRealPhotos:
    @pytest.fixture
    def deit(self) -> VisionTransformer:
        return timm.create_model("deit_tiny_patch16_224", depth=1)

    def test_imagenet_500(self, shared_data, deit) -> None:
        dataset = open_data(shared_data / "imagenet-500.tar", deit)
        synsets = sorted(ImageNetInfo().label_names())
        assert len(dataset) == 500 and len(dataset.classes) == 1000
        for index in (0, 1, 250, 499):
            image, label = dataset[index]
            assert image.shape == (3, 224, 224)
            assert synsets[label] == dataset.reader.filename(index).partition("/")[0]
        assert sorted(dataset.relabel.values()) == list(range(0, 1000, 2))

    def test_imagenette_with_ten_and_a_thousand_classes(self, shared_data, deit, tiny_vit) -> None:
        ten, thousand = (open_data(shared_data, model, split="imagenette-val.tar") for model in (tiny_vit, deit))
        places = [0, 100, 500, 985]
        assert len(ten) == len(thousand) == 986
        assert ten[0][1] == 0 and ten[985][1] == 9
        names = [[dataset.classes[dataset[place][1]] for place in places] for dataset in (ten, thousand)]
        assert names[0] == names[1]
        assert sorted(thousand.relabel.values()) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
