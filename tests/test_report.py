"""Reports: the sentence on top, tables and charts, photos in little space, and pages about runs in any state."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import leanvit
from leanvit.cli import app
from leanvit.data import open_data
from leanvit.errors import CheckpointError, ConfigError, DataError
from leanvit.explain import Explainer
from leanvit.measure import EvalResult, compare, environment
from leanvit.report import charts, gallery, gather, headline
from leanvit.report.page import Page, Source, columns, cost_charts, curve_charts, photo_cells, render, scatters, write
from leanvit.store import save

from .contract import small_vit
from .everything import Everything

CLASSES = [f"kind {index}" for index in range(10)]
QUICK = {"iterations": 1, "progress": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten classes with two noise images each."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(2):
            coarse = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
            coarse.resize((48, 40)).save(root / name / f"{name}-{number}.png")
    return root


@pytest.fixture(scope="module")
def dense():
    return small_vit()


@pytest.fixture(scope="module")
def lean(dense):
    return leanvit.slim(dense, leanvit.DGSSA(layers=(0, 1)), leanvit.GLAD(at=(2, 3))).eval()


@pytest.fixture(scope="module")
def page(dense, lean, photos) -> Page:
    table = compare(dense, {"glad": lean}, photos, batch_sizes=(1, 2), **QUICK)
    source = Source("noise", "leanvit compare …", environment=gather.machine(environment()))
    return gather.page_of(dense, {"glad": lean}, table, source, progress=False)


@pytest.fixture(scope="module")
def html(page) -> str:
    return render(page)


@pytest.fixture(scope="module")
def runs(dense, lean, tmp_path_factory) -> tuple[Path, Path]:
    """A dense run and a lean one, as the commands leave them."""
    root = tmp_path_factory.mktemp("runs")
    save(dense, root / "teacher" / "best", class_names=CLASSES)
    save(lean, root / "student" / "best", class_names=CLASSES)
    student = root / "student"
    rows = [
        row("dense", 100.0, 90.0, method="dense"),
        row("lean", 210.0, 89.5, method=str(lean.lean), speedup=2.1),
    ]
    known = {"versions": {"leanvit": "0.0.1", "torch": "2.9"}, "processor": "Abacus 9"}
    settings = {"model": str(root / "teacher"), "seed": 7}
    about = {"command": "slim", "command_line": "leanvit slim x", "settings": settings, "environment": known}
    (student / "results.json").write_text(json.dumps({**about, "rows": rows}))
    (student / "args.yaml").write_text(yaml.safe_dump({"epochs": 3, "seed": 7}))
    (student / "metrics.csv").write_text("epoch,train_loss,train_ce,val_top1\n1,2.0,1.5,60\n2,1.0,0.7,80\n")
    return root / "teacher", student


def row(name: str, speed: float, top1: float | None = None, **more):
    known = {} if top1 is None else {"top1": top1}
    return {
        "model": name,
        "infer_samples_per_sec": speed,
        "infer_gmacs": 1.0 if name == "dense" else 0.6,
        "infer_batch_size": 32,
        "precision": "fp32",
        "source": 0,
        **known,
        **more,
    }


class Checker(HTMLParser):
    """Collects tags, and what is not closed in order."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "circle", "line", "polyline", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


class TestHeadline:
    def test_says_how_much_faster_at_what_accuracy(self) -> None:
        source = Source("photos", environment={"processor": "Abacus 9", "versions": {"torch": "3.0"}})
        rows = [row("dense", 100.0, 80.0, threads=2, device="cpu"), row("glad", 250.0, 79.4, threads=2, device="cpu")]
        head = headline.headline(Page(rows=rows, sources=[source], count=1000))
        assert head.sentence == (
            "glad classifies 2.50 times as many images a second as the dense model, "
            "at 79.4\u00a0% accuracy instead of 80.0\u00a0%."
        )
        assert head.machine == "Abacus 9, 2 threads, torch 3.0" and head.chosen == ""
        figures = {figure.name: figure for figure in head.figures}
        assert figures["Images a second, in batches of 32 (fp32)"].change == "2.50×"
        accuracy = figures["Accuracy (top-1), % of 1000 images (± 1.3)"]
        assert (accuracy.dense, accuracy.lean, accuracy.change) == ("80.0", "79.4", "-0.6 points")
        assert figures["Multiply-accumulates an image, billions"].change == "40% fewer"

    def test_says_slower_as_plainly(self) -> None:
        head = headline.headline(Page(rows=[row("dense", 100.0), row("lazy", 80.0, infer_gmacs=1.2)]))
        assert head.sentence.startswith("lazy is slower than the dense model: it classifies 0.80 times as many")
        assert head.figures[-1].change == "20% more"

    def test_puts_forward_the_fastest_that_is_close(self) -> None:
        rows = [row("dense", 100, 80.0), row("a", 150, 79.9), row("b", 200, 79.2), row("c", 300, 70.0)]
        head = headline.headline(Page(rows=rows))
        assert head.model == "b" and "Of 3 lean models, the fastest that stays within 1 point" in head.chosen
        head = headline.headline(Page(rows=[rows[0], row("d", 400, 60.0), rows[3]]))
        assert head.model == "c" and "None of 2 lean models stays within" in head.chosen

    def test_compares_within_one_point_of_measurement(self) -> None:
        rows = [
            row("dense", 100, 80.0),
            row("a", 200, 80.0),
            row("dense", 10, 80.0, infer_batch_size=1),
            row("a", 11, 80.0, infer_batch_size=1),
            row("dense", 1000, infer_img_size=512),
            row("a", 9000, infer_img_size=512),
        ]
        head = headline.headline(Page(rows=rows))
        speeds = [figure.change for figure in head.figures if figure.name.startswith("Images")]
        assert "2.00 times" in head.sentence and sorted(speeds) == ["1.10×", "2.00×"]

    def test_nothing_to_compare(self) -> None:
        assert headline.headline(Page()) is None
        assert headline.headline(Page(rows=[row("dense", 1.0)])) is None
        assert "<h1>Report of a model</h1>" in render(Page())

    def test_standard_error(self) -> None:
        assert headline.standard_error(50.0, 100) == pytest.approx(5.0)

    def test_what_is_left_out(self, dense, photos) -> None:
        lean = leanvit.slim(dense, Everything())
        found = Explainer(lean, rounds=1)(photos / "kind 0" / "kind 0-0.png")
        assert headline.ignored({"all": [found]}) == (
            "In the photo below, its last block works on 8 tokens in place of 16 patches "
            "and over all blocks it leaves out 62% of the patches."
        )
        plain = Explainer(leanvit.slim(dense), rounds=1)(photos / "kind 0" / "kind 0-0.png")
        assert headline.ignored({"all": [plain]}) == "" and headline.ignored({}) == ""


class TestCharts:
    def test_names_meet_neither_each_other_nor_marks(self) -> None:
        points = [charts.Point(f"method number {index}", 100 + index, 80 + 0.1 * index) for index in range(5)]
        drawn = str(charts.scatter(points, "x", "y", best=points))
        texts = re.findall(r'<text class="(start|mid|end)" x="([\d.]+)" y="([\d.]+)">method', drawn)
        assert len(texts) == 5
        heights = sorted(float(y) for _, _, y in texts)
        assert all(later - earlier > 10 for earlier, later in pairwise(heights))

    def test_charts_say_which_source_where_there_are_several(self) -> None:
        rows = [row(name, 10.0, 80.0, source=source) for source in (0, 1) for name in ("dense", "a")]
        assert [title for title, _ in scatters(rows)] == ["fp32, batch 32, source 1", "fp32, batch 32, source 2"]
        assert [title for title, _ in scatters(rows[:2])] == ["fp32, batch 32"]

    def test_points_say_what_they_are(self) -> None:
        drawn = Checker(str(charts.scatter([charts.Point("a<b", 1, 2, about=["fast"])], "x", "y")))
        (point,) = drawn.tags("g")
        assert point["tabindex"] == "0" and point["aria-label"] == "a<b, fast"
        assert not drawn.open

    def test_bars_are_to_scale(self) -> None:
        drawn = Checker(str(charts.bars({"one": [40.0, 10.0], "two": [0.0, 20.0]}, ["dense", "lean"], "MACs")))
        widths = [float(tag["width"]) for tag in drawn.tags("rect")]
        assert widths == pytest.approx([4 * widths[1], widths[1], 0, 2 * widths[1]], rel=0.01)

    def test_scale_marks_round_values(self) -> None:
        assert charts.Scale([0, 10], 0, 100, zero=True, margin=0).ticks() == [0, 2, 4, 6, 8, 10]
        assert charts.Scale([1, 3], 0, 100, margin=0).ticks(whole=True) == [1, 2, 3]
        assert len(charts.Scale([5.0], 0, 100).ticks()) > 1

    def test_counted(self) -> None:
        assert [charts.counted(number, "thread") for number in (1, 2)] == ["1 thread", "2 threads"]

    def test_curves(self) -> None:
        rows = [
            {"epoch": 1, "train_loss": 2.0, "train_ce": 2.0, "train_kd": None, "val_top1": 50.0},
            {"epoch": 2, "train_loss": 1.0, "train_ce": 1.0, "train_kd": 0.5, "val_top1": float("nan")},
        ]
        found = dict(curve_charts(rows))
        assert set(found) == {"loss", "accuracy"}
        assert found["loss"].count("<polyline") == 2  # the loss, which is all CE, and the term that came later
        assert curve_charts([]) == [] and curve_charts([{"step": 1}]) == []

    def test_costs_leave_out_next_to_nothing(self, dense, lean) -> None:
        costs = {"dense": leanvit.count(dense), "lean": leanvit.count(lean)}
        by_layer, by_kind = cost_charts(costs)["lean"]
        assert ">blocks.0<" in by_layer and ">linear<" in by_kind and ">other<" not in by_kind


class TestTable:
    def test_columns_that_say_something(self) -> None:
        found = {column.heading: column for column in columns([row("dense", 100.0), row("a", 200.0, speedup=2.0)])}
        assert "Top-1 %" not in found and found["Speedup"].cells == [("", None), ("2.00×", 2.0)]
        assert found["Source"].cells[0] == ("1", 0) and found["Images/s"].numbers and not found["Model"].numbers


class TestGallery:
    def test_photo_by_block(self, page) -> None:
        data = gallery.gallery(page.galleries)
        assert [one["src"].partition(";")[0] for one in data["photos"]] == ["data:image/jpeg"] * gather.PHOTOS
        (model,) = data["models"]
        blocks = model["photos"][0]["blocks"]
        assert [block["tokens"] for block in blocks] == [16, 16, 8, 4]
        assert [[found["kind"] for found in block["maps"]] for block in blocks] == [
            ["static_attention", "dynamic_attention"],
            ["static_attention", "dynamic_attention"],
            ["source"],
            ["source"],
        ]
        assert data["layouts"][blocks[2]["layout"]] == page.galleries["glad"][0].blocks[2].owner.tolist()
        assert json.loads(json.dumps(data)) == data

    def test_what_is_the_same_for_all_photos_is_kept_once(self, page) -> None:
        data = gallery.gallery(page.galleries)
        static = {photo["blocks"][0]["maps"][0]["map"] for photo in data["models"][0]["photos"]}
        dynamic = {photo["blocks"][0]["maps"][1]["map"] for photo in data["models"][0]["photos"]}
        assert len(static) == 1 and len(dynamic) == gather.PHOTOS

    def test_maps_have_no_key_for_what_is_left_out(self, dense, photos) -> None:
        lean = leanvit.slim(dense, Everything())
        found = Explainer(lean, rounds=1)(next(photos.rglob("*.png")))
        data = gallery.gallery({"all": [found]})
        after = data["models"][0]["photos"][0]["blocks"][2]["maps"][0]
        keys = np.array(data["layouts"][after["columns"]])
        assert (keys == -1).sum() == 8 and sorted(keys[keys >= 0]) == list(range(8))
        assert data["layouts"][after["rows"]] == keys.tolist()  # nor do they attend to anything

    def test_map_values_survive(self, page) -> None:
        found = page.galleries["glad"][0].blocks[0].maps[1]
        data = gallery.gallery(page.galleries)
        entry = data["models"][0]["photos"][0]["blocks"][0]["maps"][1]
        picture = decode(data["maps"][entry["map"]])
        weights = found.values.mean(dim=0)[1:, 1:].numpy()
        np.testing.assert_allclose((picture / 255) ** 2, weights / weights.max(axis=1, keepdims=True), atol=0.07)

    def test_large_grids_are_averaged(self) -> None:
        found = gallery._coarse((32, 20), 16)
        assert len(found) == 640 and int(found.max()) == 16 * 16 - 1
        sizes = torch.bincount(found)
        assert int(sizes.min()) >= 2 and int(sizes.max()) <= 4
        assert torch.equal(gallery._coarse((4, 4), 16), torch.arange(16))

    def test_stays_within_its_bytes(self, page, monkeypatch) -> None:
        whole = sum(map(len, gallery.gallery(page.galleries)["maps"]))
        monkeypatch.setattr(gallery, "MAP_BYTES", whole - 1)
        monkeypatch.setattr(gallery, "SIDES", (4, 2))
        data = gallery.gallery(page.galleries)
        assert sum(map(len, data["maps"])) < whole
        assert decode(data["maps"][0]).shape == (4, 4)


def decode(source: str) -> np.ndarray:
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L"), dtype=float)


class TestPage:
    def test_is_whole_and_needs_no_network(self, html) -> None:
        found = Checker(html)
        assert not found.open
        for _, attributes in found.found:
            for name in ("src", "href", "action", "data", "srcset"):
                assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert "@import" not in html and "url(" not in html
        assert "default-src 'none'" in found.tags("meta")[3]["content"]
        assert len(html) < 5e6

    def test_pictures_have_words(self, html) -> None:
        found = Checker(html)
        assert found.tags("img") and all(tag["alt"] for tag in found.tags("img"))
        assert all(tag["aria-label"] for tag in found.tags("svg"))
        assert found.tags("html")[0]["lang"] == "en"
        ids = [tag["id"] for _, tag in found.found if "id" in tag]
        assert len(ids) == len(set(ids))
        links = {tag["href"][1:] for tag in found.tags("a")}
        assert links <= set(ids) and len(links) >= 5

    def test_colours_can_be_read(self) -> None:
        def luminance(colour: str) -> float:
            digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
            parts = (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))
            red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue

        style = (Path(gallery.__file__).parent / "page.css").read_text(encoding="utf-8")
        schemes = [
            dict(re.findall(r"--(\w+): #(\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
        ]
        assert [scheme["paper"] for scheme in schemes] == ["fff", "161616"]
        for scheme in schemes:
            for name in set(scheme) - {"paper", "rule"}:
                dark, light = sorted((luminance(scheme["paper"]), luminance(scheme[name])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG 2.2, level AA

    def test_holds_the_figures(self, html, page) -> None:
        lean = next(row for row in page.rows if row["model"] == "glad")
        assert f"{lean['top1']:.1f}" in html and f"{lean['speedup']:.2f}×" in html
        assert "Replace the attention of chosen layers" in html  # what the methods do, in their own words
        assert environment()["processor"] in html and "leanvit compare …" in html
        assert "easiest (5)" in html and "Everywhere: pixels 32, precision fp32." in html

    def test_captions_of_many_models_are_short(self, page) -> None:
        (photos,) = page.galleries.values()
        few, many = (photo_cells({f"m{number}": photos for number in range(models)}) for models in (2, 4))
        assert all("%" in "".join(models) for models in few[0]["said"].values())
        assert sorted(name for models in many[0]["said"].values() for name in models) == [
            "dense",
            "m0",
            "m1",
            "m2",
            "m3",
        ]

    def test_photos_run_from_easy_to_hard(self, page) -> None:
        sureness = [one.dense.top[0].probability for one in page.galleries["glad"]]
        assert sureness == sorted(sureness, reverse=True) and len({one.name for one in page.galleries["glad"]}) == 12

    def test_quarters_add_up(self, page) -> None:
        rows = page.difficulty["glad"]
        whole = next(row for row in page.rows if row["model"] == "glad")
        assert len(rows) == 4 and np.mean([row["top1"] for row in rows]) == pytest.approx(whole["top1"])
        assert np.mean([row["agreement"] for row in rows]) == pytest.approx(whole["agreement"])
        assert [row["confidence"] for row in rows] == sorted((row["confidence"] for row in rows), reverse=True)
        assert "gmacs_mean" not in rows[0]  # every image costs the same

    def test_cost_where_it_differs_by_image(self, dense, photos, monkeypatch) -> None:
        surest, right = torch.linspace(1, 0, 20), torch.zeros(20)
        result = EvalResult(0, 0, None, 20, (), right, right, surest, macs=torch.arange(20) * 1e9)
        rows = gather.quarters(None, result, gather.easiest_first(result))
        assert [row["gmacs_mean"] for row in rows] == pytest.approx([2, 7, 12, 17]) and "dense_top1" not in rows[0]
        monkeypatch.setattr(Everything, "data_dependent", True, raising=False)
        lean = leanvit.slim(dense, Everything())
        assert gather.cost_of(lean, open_data(photos, dense)).macs == pytest.approx(leanvit.count(lean).macs)

    def test_damaged_images_shift_nothing(self, dense, lean, photos, tmp_path) -> None:
        import shutil

        broken = tmp_path / "photos"
        shutil.copytree(photos, broken)
        (broken / "kind 0" / "kind 0-0.png").write_bytes(b"no image")
        images = open_data(broken, dense)
        table = compare(dense, {"lean": lean}, images, batch_sizes=(1,), **QUICK)
        page = gather.page_of(dense, {"lean": lean}, table, Source("noise"), progress=False)
        assert page.count == 19
        for found in page.galleries["lean"]:
            assert found.label == found.name.rpartition("-")[0]

    def test_every_kind_is_drawn(self, dense, photos) -> None:
        lean = leanvit.slim(dense, Everything())
        table = compare(dense, {"all": lean}, photos, batch_sizes=(1,), **QUICK)
        page = gather.page_of(dense, {"all": lean}, table, Source("noise"), progress=False)
        data = gallery.gallery(page.galleries)
        block = data["models"][0]["photos"][0]["blocks"][2]
        kinds = [found["kind"] for found in block["maps"]]
        assert kinds == [*gallery.MAPS, "source"] and set(kinds) == set(data["titles"])
        assert block["heads"] == [0, 1, 0] and block["sublayers"] == [1, 0] and block["out"].count("1") == 12

    def test_script_in_a_name_stays_text(self) -> None:
        text = render(Page(rows=[row("dense", 1.0, 1.0), row("</script><script>alert(1)", 2.0, 1.0)]))
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text

    def test_write(self, page, tmp_path) -> None:
        made = write(page, tmp_path / "deep" / "report.html")
        assert made.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and len(list(made.parent.iterdir())) == 1
        with pytest.raises(ConfigError, match=r"report\.html exists; give another --output, or --overwrite"):
            write(page, made)
        write(Page(), made, overwrite=True)
        assert "Report of a model" in made.read_text(encoding="utf-8")
        with pytest.raises(ConfigError, match="is a folder; give the name of an HTML file"):
            write(page, tmp_path)


class TestRuns:
    def test_measured_now(self, runs, photos) -> None:
        teacher, student = runs
        page = gather.page_of_runs([student, teacher], data_dir=str(photos), command="leanvit report", **QUICK)
        assert {row["model"] for row in page.rows} == {"dense", "student"} and all("top1" in row for row in page.rows)
        assert page.count == 20 and len(page.galleries["student"]) == 12 and not page.missing
        assert page.galleries["student"][0].blocks[0].maps[1].kind == "dynamic_attention"
        assert list(page.curves) == ["student"] and page.sources[0].command == "leanvit report"
        assert [source.seed for source in page.sources] == [None, 7]
        training = page.sources[1]
        assert training.command == "leanvit slim x" and training.environment["processor"] == "Abacus 9"

    def test_a_sample_of_the_images(self, runs, photos) -> None:
        page = gather.page_of_runs(list(runs), data_dir=str(photos), images=10, **QUICK)
        assert page.count == 10 and "Accuracy on 10 of the 20 images, evenly spread." in page.sources[0].notes

    def test_a_run_without_images(self, runs) -> None:
        page = gather.page_of_runs([runs[1]], **QUICK)
        assert [row["model"] for row in page.rows] == ["dense", "student"] and not page.galleries
        assert "No photos: give --data-dir" in page.missing[0]
        text = render(page)
        assert "student classifies 2.10 times as many" in text and "No photos: give --data-dir" in text
        assert 'id="photos"' not in text and "Abacus 9" in text

    def test_a_run_made_by_an_older_version(self, runs, lean, tmp_path) -> None:
        page = gather.page_of_runs([runs[1]], **QUICK)
        ours = environment()["versions"].get("leanvit")
        assert page.sources[0].notes == [f"Measured with leanvit 0.0.1; this page was made with {ours}."]
        # Before results.json knew of command lines and environments, and metrics.csv of more than losses.
        old = tmp_path / "old"
        save(lean, old / "last")
        rows = [{"model": "dense", "infer_samples_per_sec": 10.0}, {"model": "lean", "infer_samples_per_sec": 20.0}]
        (old / "results.json").write_text(json.dumps({"rows": rows}))
        (old / "args.yaml").write_text("")
        (old / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n")
        page = gather.page_of_runs([old], **QUICK)
        text = render(page)
        assert "old classifies 2.00 times as many" in text
        assert "It was not recorded which version of leanvit measured this." in text
        assert "a processor that was not recorded" in text and "the full line was not recorded" in text

    def test_a_saved_model_is_timed(self, lean, tmp_path) -> None:
        save(lean, tmp_path / "bare")
        page = gather.page_of_runs([tmp_path / "bare"], **QUICK)
        assert {row["model"] for row in page.rows} == {"dense", "bare"} and page.sources[0].seed == 0
        assert "No accuracy of bare: there is no results.json in the folder." in page.missing
        assert "Speed and accuracy" in render(page)

    def test_without_the_dense_weights(self, lean, photos, tmp_path) -> None:
        save(lean, tmp_path / "bare", class_names=CLASSES)
        page = gather.page_of_runs([tmp_path / "bare"], data_dir=str(photos), **QUICK)
        assert all(("top1" in row) == (row["model"] == "bare") for row in page.rows)
        assert "give --teacher" in page.missing[0] and page.costs["dense"].macs > page.costs["bare"].macs
        text = render(page)
        assert "at " in headline.headline(page).sentence and "how sure the lean model is" in text

    def test_the_teacher_is_found_where_the_run_says(self, runs) -> None:
        opened = gather.read_runs([runs[1]])
        dense, knows = gather.find_dense(opened, None)
        assert knows and isinstance(dense, torch.nn.Module) and not hasattr(dense, "lean")
        moved = [replace(opened[0], results={"settings": {"model": "/no/such/run"}})]
        assert gather.find_dense(moved, None)[1] is False

    def test_names_tell_runs_apart(self, lean, tmp_path) -> None:
        for parent in ("a", "b"):
            save(lean, tmp_path / parent / "run")
        names = [run.name for run in gather.read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
        assert names == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("results.json", "{", r"results\.json cannot be read"),
            ("results.json", "[]", r"results\.json holds no rows of figures"),
            ("results.json", '{"rows": [1]}', r"results\.json holds no rows of figures"),
            ("args.yaml", "a: [", r"args\.yaml cannot be read"),
            ("metrics.csv", "", r"metrics\.csv is empty"),
        ],
    )
    def test_damaged_files(self, lean, tmp_path, file, content, message) -> None:
        save(lean, tmp_path / "run" / "last")
        (tmp_path / "run" / file).write_text(content)
        with pytest.raises(ConfigError, match=message):
            gather.page_of_runs([tmp_path / "run"], **QUICK)

    def test_nothing_lean(self, runs, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"none of .*teacher is lean; give a run of leanvit slim"):
            gather.page_of_runs([runs[0]], **QUICK)
        with pytest.raises(ConfigError, match="a run is given more than once"):
            gather.page_of_runs([runs[1], runs[1]], **QUICK)
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="holds no model"):
            gather.page_of_runs([tmp_path / "empty"], **QUICK)

    def test_models_that_prepare_images_otherwise(self, runs, dense, lean, photos, tmp_path) -> None:
        other = leanvit.slim(dense, *lean.lean.methods)
        other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.1, 0.1, 0.1)}
        save(other, tmp_path / "other", class_names=CLASSES)
        with pytest.raises(ConfigError, match="other prepares images otherwise than the dense model"):
            gather.page_of_runs([runs[0], tmp_path / "other"], data_dir=str(photos), **QUICK)

    def test_images_of_other_classes(self, runs, photos) -> None:
        with pytest.raises(DataError, match="no such file or folder"):
            gather.page_of_runs(list(runs), data_dir="no-such-folder", **QUICK)


class TestCommands:
    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments)])

    def test_report(self, runs, photos, tmp_path) -> None:
        out = tmp_path / "report.html"
        options = ("--data-dir", photos, "--num-bench-iter", 1, "--device", "cpu", "--output", out)
        result = self.run("report", *runs, *options)
        assert result.exit_code == 0, result.output
        text = out.read_text(encoding="utf-8")  # how fast so small a model is, and so what is said of it, is chance
        assert "report.html" in result.output and "student" in text and "MACs" in text
        again = self.run("report", *runs, *options)
        assert again.exit_code == 2 and "exists; give another --output, or --overwrite" in again.output

    def test_compare_writes_one(self, runs, photos, tmp_path) -> None:
        out = tmp_path / "page.html"
        options = ("--data-dir", photos, "-b", 1, "--num-bench-iter", 1, "--device", "cpu", "--report", out)
        result = self.run("compare", *runs, *options)
        assert result.exit_code == 0, result.output
        text = out.read_text(encoding="utf-8")
        assert "What the model does with a photo" in text and "leanvit" in text
        assert self.run("compare", *runs, *options).exit_code == 2

    def test_a_place_that_cannot_take_it(self, runs, tmp_path) -> None:
        (tmp_path / "file").write_text("")
        result = self.run("report", runs[1], "--output", tmp_path / "file" / "report.html")
        assert result.exit_code == 2 and "cannot be written" in " ".join(result.output.split())


def test_the_package_carries_what_the_page_is_made_of() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (pattern,) = [one for one in project["tool"]["setuptools"]["package-data"]["leanvit"] if "page" in one]
    package = Path(leanvit.__file__).parent
    assert {file.suffix for file in package.glob(pattern)} >= {".html", ".css", ".js"}


@pytest.mark.parametrize(("name", "own"), [("b", "b"), ("renamed", "a")])
def test_of_several_lean_models_a_run_takes_its_own_rows(tiny_vit, name, own) -> None:
    model = leanvit.slim(tiny_vit, leanvit.GLAD(at=(2,)))
    methods = {"dense": "dense", "a": str(model.lean), "b": "castling"}
    rows = [{"model": row, "method": method, "row": row} for row, method in methods.items()]
    found = gather._own_rows(gather.Run(name, Path("run"), model, {"rows": rows}))
    assert [(row["model"], row["row"]) for row in found] == [("dense", "dense"), (name, own)]
