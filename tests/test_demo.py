"""The demo: every registered method takes part, and what it promises to write is there."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from leanvit import demo, methods
from leanvit.bench import bench
from leanvit.measure import compare
from leanvit.report.tables import read_csv
from leanvit.warmstart import warm_start


def test_every_registered_method_takes_part() -> None:
    recipes = demo.default_recipes()
    assert set(methods.available()) <= set(recipes)
    assert [method.name for method in recipes["dgssa+glad"]] == ["dgssa", "glad"]


def test_small_vit_has_a_few_hundred_thousand_parameters() -> None:
    assert 200_000 < sum(parameter.numel() for parameter in demo.small_vit().parameters()) < 500_000


def test_demo_writes_and_prints_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"epochs": 1, "batch_size": 256, "warmup_epochs": 0}
    monkeypatch.setattr(demo, "DENSE_TRAINING", replace(demo.DENSE_TRAINING, **quick))
    monkeypatch.setattr(demo, "LEAN_TRAINING", replace(demo.LEAN_TRAINING, **quick))
    monkeypatch.setattr(demo, "warm_start", partial(warm_start, steps=0, limit=64))
    # In this process, which knows of the changes above.
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda processes, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(demo, "compare", partial(compare, iterations=1))
    once = {"batch_sizes": (1,), "iterations": 1, "warmup": 0}
    monkeypatch.setattr(demo, "bench", lambda models, **options: bench(models, **(options | once)))
    demo.run(tmp_path / "demo", json=tmp_path / "copy.json")

    rows = read_csv(tmp_path / "demo" / "results.csv")
    digits = [row for row in rows if row["data"] == "digits"]
    speed = [row for row in rows if row["data"] == "random"]
    names = ["dense", *demo.default_recipes()]
    assert [row["model"] for row in digits] == names
    adaptive = {name for name, recipe in demo.default_recipes().items() if demo.adapts(recipe)}
    assert {row["model"] for row in speed} == set(names) - adaptive
    assert not any("top1" in row and row["top1"] for row in speed)
    # What decides by the image has learned nothing yet.
    assert all(row["infer_gmacs"] < digits[0]["infer_gmacs"] for row in digits[1:] if row["model"] not in adaptive)
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert written["rows"] and written["environment"]["processor"]
    assert json.loads((tmp_path / "copy.json").read_text()) == written
    assert Image.open(tmp_path / "demo" / "pareto.png").width > 300
    printed = capsys.readouterr().out
    assert "random weights, speed only" in printed and "dgssa+glad" in printed
    report = tmp_path / "demo" / "report.html"
    assert f"The report, to open in a browser: {report}" in printed
    page = report.read_text(encoding="utf-8")
    assert all(f"<option>{name}</option>" in page for name in names[1:]) and len(page) < 5e6
    assert len(list((tmp_path / "demo").iterdir())) == 4
