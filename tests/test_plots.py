"""Pictures: that they are drawn whole, that names do not cover each other, and which points nothing beats."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from leanvit.errors import ConfigError
from leanvit.report import plots
from leanvit.report.plots import frontier, pareto, training_curves

POINTS = {
    "dense": (100, 96.1),
    "a": (112, 95.9),
    "b": (150, 95.3),
    "c": (152, 95.25),
    "d": (154, 95.2),
    "e": (99, 94.8),
}


def rows(**common):
    return [
        {"model": name, "method": name, "infer_samples_per_sec": speed, "top1": top1, **common}
        for name, (speed, top1) in POINTS.items()
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def test_frontier_is_what_nothing_beats():
    best = frontier(
        [*rows(), {"model": "f", "infer_samples_per_sec": 154, "top1": 95.0}], "infer_samples_per_sec", "top1"
    )
    assert [row["model"] for row in best] == ["dense", "a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["pareto.png", "deep/pareto.svg", "pareto.pdf"])
def test_pareto_writes_a_picture(tmp_path, name):
    pareto(rows(), tmp_path / name, title="digits")
    assert (tmp_path / name).stat().st_size > 5000
    assert len(list((tmp_path / name).parent.iterdir())) == 1


def test_names_cover_neither_each_other_nor_the_edge(tmp_path, drawn):
    crowded = [{**row, "model": f"some longer method name {row['model']}"} for row in rows()]
    pareto(crowded, tmp_path / "pareto.png")
    (axes,) = drawn[0].axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(crowded)
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[index + 1 :]) == 0
        assert axes.get_window_extent().contains(*box.min)
        assert axes.get_window_extent().contains(*box.max)


def test_names_are_no_formulas(tmp_path):
    pareto([{**row, "model": f"${row['model']}_x^$"} for row in rows()], tmp_path / "p.png", title="$a_$")
    assert (tmp_path / "p.png").exists()


def test_points_of_measurement_get_a_panel_each(tmp_path, drawn):
    mixed = rows(precision="fp32", infer_batch_size=1) + rows(precision="bf16", infer_batch_size=32)
    pareto(mixed, tmp_path / "pareto.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["bf16, batch 32", "fp32, batch 1"]


def test_one_point_is_enough(tmp_path):
    pareto(rows()[:1], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").exists()


def test_pareto_refuses_rows_without_accuracy(tmp_path):
    with pytest.raises(ConfigError, match="no row has both infer_samples_per_sec and top1"):
        pareto([{"model": "dense", "infer_samples_per_sec": 1.0}], tmp_path / "pareto.png")
    assert not list(tmp_path.iterdir())


def test_training_curves(tmp_path, drawn):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,train_loss,val_top1,lr\n0,2.1,,0.1\n1,1.1,70.5,0.1\n")
    training_curves(metrics, tmp_path / "curves.png")
    loss, accuracy = drawn[0].axes
    assert loss.lines[0].get_ydata().tolist() == [2.1, 1.1]
    assert accuracy.lines[0].get_ydata().tolist() == [70.5]


@pytest.mark.parametrize("content", ["epoch,lr\n0,0.1\n", "train_loss\n1.0\n", "epoch,train_loss\n"])
def test_training_curves_refuses(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ConfigError, match="has no epochs with losses or accuracies"):
        training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")


def test_nothing_is_left_when_a_picture_cannot_be_written(tmp_path, monkeypatch):
    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plots.Figure, "savefig", fail)
    with pytest.raises(ConfigError, match=r"cannot write .*pareto\.png: disk full"):
        pareto(rows(), tmp_path / "pareto.png")
    assert not list(tmp_path.iterdir())
