"""What a page shows, gathered: from models in memory, or from the folders of runs; what is missing is measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Subset

from ..bench import bench, no_garbage_collection
from ..count import Cost, count, deployed_form
from ..data import ImageData, data_config, open_data, report_damage
from ..errors import ConfigError, DataError, LeanVitError
from ..explain import Explainer, Explanation
from ..measure import Comparison, EvalResult, compare, environment, evaluate
from ..model import LeanModel, data_dependent
from ..store import model_arguments, resolve_model
from .headline import DENSE
from .page import About, Page, Source
from .tables import Row, read_csv

if TYPE_CHECKING:
    from ..data import ClassMap

PHOTOS = 12
"""How many photos a page walks through."""

QUARTERS = ("easiest", "second", "third", "hardest")

COSTED = 16
"""Images that layers are counted on, where a model's cost differs by image."""


def page_of(
    dense: nn.Module | None,
    lean: Mapping[str, nn.Module],
    table: Comparison,
    source: Source,
    *,
    progress: bool = True,
) -> Page:
    """A page about models in memory that were compared already.

    Args:
        dense: The dense model.
        lean: Lean models by name. Not yet deployed they have more to show; what is counted is deployed.
        table: What `leanvit.compare` gave, on images of a path or as `leanvit.data.open_data` opens them.
        source: How it was measured.
        progress: Show a progress bar.
    """
    images = table.images
    order = easiest_first(table.results.get(DENSE) or next(iter(table.results.values())))
    costs = {DENSE: count(dense)} if dense is not None else {}
    return Page(
        models={name: about(model) for name, model in lean.items()},
        rows=[{**row, "source": 0} for row in table.rows],
        costs={**costs, **{name: cost_of(model, images) for name, model in lean.items()}},
        sources=[source],
        count=len(order),
        galleries=galleries(dense, lean, images, order, progress=progress),
        difficulty={name: quarters(table.results.get(DENSE), table.results[name], order) for name in lean},
    )


def about(lean: Any) -> About:
    """What a lean model is."""
    height, width = lean.patch_embed.img_size
    return About(
        base=f"{lean.pretrained_cfg['architecture']}, {height}×{width} pixels",
        methods={str(method): (type(method).__doc__ or "").partition("\n")[0] for method in lean.lean.methods},
    )


def easiest_first(result: EvalResult) -> list[int]:
    """Places of the evaluated images, those that the model is surest of first."""
    return result.confidences.argsort(descending=True, stable=True).tolist()


def galleries(
    dense: nn.Module | None,
    lean: Mapping[str, nn.Module],
    images: ImageData | Subset[Any],
    order: Sequence[int],
    *,
    progress: bool = True,
) -> dict[str, list[Explanation]]:
    """Explained photos by lean model, evenly spread from the easiest to the hardest.

    Args:
        dense: The dense model.
        lean: Lean models by name.
        images: The images that were evaluated.
        order: Places of those that could be read, easiest first.
        progress: Show a progress bar.
    """
    data, readable = _readable(images)
    chosen = [readable[order[place]] for place in _spread(len(order), PHOTOS)]
    names = data.classes or None
    explainers = {
        name: Explainer(
            model,
            teacher=dense,
            class_names=names if names and len(names) == model.num_classes else None,  # type: ignore[arg-type]
            crop_pct=data.crop_pct,
            rounds=5,
        )
        for name, model in lean.items()
    }
    found: dict[str, list[Explanation]] = {name: [] for name in lean}
    steps = [(name, index) for index in chosen for name in lean]
    shown = track(steps, "explaining photos", console=Console(stderr=True), transient=True, disable=not progress)
    with no_garbage_collection():  # once, not before each timing
        for name, index in shown:
            photo, label = data.picture(index)
            title = Path(data.reader.filename(index)).name
            found[name].append(explainers[name](photo, name=title, label=label))
    return found


def quarters(reference: EvalResult | None, result: EvalResult, order: Sequence[int]) -> list[Row]:
    """A row for each quarter of the images, from the easiest to the hardest.

    Args:
        reference: What the dense model took each image for, if there is one.
        result: What the lean model took it for, and what each cost where that differs.
        order: Places of the images, easiest first.
    """
    size = math.ceil(len(order) / len(QUARTERS))
    surest = result if reference is None else reference
    rows: list[Row] = []
    for number, name in enumerate(QUARTERS):
        at = torch.tensor(order[number * size : (number + 1) * size], dtype=torch.long)
        if not len(at):
            continue
        row: Row = {"quarter": f"{name} ({len(at)})", "confidence": _mean(surest.confidences, at)}
        if reference is not None:
            row["dense_top1"] = 100 * _mean(reference.predictions == reference.labels, at)
        row["top1"] = 100 * _mean(result.predictions == result.labels, at)
        if reference is not None:
            row["agreement"] = 100 * _mean(result.predictions == reference.predictions, at)
        if result.macs is not None:
            row["gmacs_mean"] = _mean(result.macs, at) / 1e9
        rows.append(row)
    return rows


def _mean(values: torch.Tensor, at: torch.Tensor) -> float:
    return values[at].double().mean().item()


def cost_of(model: Any, images: ImageData | Subset[Any]) -> Cost:
    """What a model costs on paper; the mean of some images where it depends on them."""
    if not data_dependent(model):
        return count(model)
    data, readable = _readable(images)
    batch = [data[readable[place]] for place in _spread(len(readable), COSTED)]
    return count(model, images=torch.stack([sample[0] for sample in batch if sample is not None]))


def _readable(images: ImageData | Subset[Any]) -> tuple[ImageData, list[int]]:
    """The data set behind a subset, and the indices in it of the images that could be read, in order."""
    if isinstance(images, Subset):
        data, indices = images.dataset, list(images.indices)
    else:
        data, indices = images, list(range(len(images)))
    if not isinstance(data, ImageData):
        raise DataError(f"photos are shown from images as open_data opens them, not from a {type(data).__name__}")
    return data, [index for index in indices if not data.is_damaged(index)]


def _spread(length: int, most: int) -> list[int]:
    """At most so many places of a list, evenly spread from its first to its last."""
    most = min(length, most)
    return [round(number * (length - 1) / max(most - 1, 1)) for number in range(most)]


# ---- from the folders of runs


@dataclass(frozen=True)
class Run:
    """A run's folder, or a saved model's, as far as a page can use it.

    Args:
        name: The folder's name, or as much of its path as tells it from the others.
        path: The folder.
        model: Its model.
        results: ``results.json``: rows and how they were measured; empty without one.
        settings: ``args.yaml``, the settings of the training; empty without one.
        curves: Rows of ``metrics.csv``.
    """

    name: str
    path: Path
    model: Any
    results: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: Sequence[Row] = ()

    @property
    def is_lean(self) -> bool:
        """Whether it is a lean model."""
        return isinstance(self.model, LeanModel)


def page_of_runs(
    runs: Sequence[str | os.PathLike[str]],
    *,
    teacher: str | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    class_map: ClassMap = "",
    images: int = 1000,
    threads: int = 2,
    iterations: int | None = None,
    device: str = "cpu",
    command: str = "",
    progress: bool = True,
) -> Page:
    """A page about the runs in some folders.

    With images everything is measured now, all models in turns. Without, figures are taken from each run's
    ``results.json``, and a run that has none is timed on random images.

    Args:
        runs: Folders of runs or saved models; a dense one among them is what the lean ones are compared with.
        teacher: The dense model, if it is not among the runs: a timm name, a folder or ``hf-hub:…``.
        data_dir: Labelled images, as `leanvit.data.open_data` takes them.
        split, class_map: How they are opened.
        images: Measure accuracy on at most so many, evenly spread.
        threads, iterations, device: How to time, as for `leanvit.bench`.
        command: The command line, to be shown.
        progress: Show progress bars.

    Raises:
        CheckpointError: A folder holds no model.
        ConfigError: None of the models is lean, or a file of a run cannot be understood.
        DataError: The images are missing or do not fit.
    """
    opened = read_runs(runs)
    lean = {run.name: run for run in opened if run.is_lean}
    if not lean:
        raise ConfigError(f"none of {', '.join(map(str, runs))} is lean; give a run of leanvit slim")
    dense, knows = find_dense(opened, teacher)
    models = {name: run.model for name, run in lean.items()}
    now = Source(
        title=", ".join(filter(None, (data_dir, split))) or "random images",
        command=command,
        seed=None if data_dir else 0,
        settings={name: str(run.model.lean) for name, run in lean.items()} | {"data": data_dir, "threads": threads},
        environment=machine(environment()),
    )
    timing: dict[str, Any] = {"threads": threads, "iterations": iterations, "device": device, "progress": progress}
    if data_dir is not None:
        page = _measured(dense, knows, models, data_dir, now, images, timing, split=split, class_map=class_map)
    else:
        page = _recorded(list(lean.values()), dense, now, timing)
    in_order = sorted(opened, key=lambda run: not run.is_lean)
    return replace(
        page,
        curves={run.name: run.curves for run in in_order if run.curves},
        sources=[*page.sources, *(_training(run) for run in in_order if run.settings)],
    )


def _measured(
    dense: nn.Module,
    knows: bool,
    lean: Mapping[str, nn.Module],
    path: str,
    source: Source,
    most: int,
    timing: Mapping[str, Any],
    **opening: Any,
) -> Page:
    reference = dense if knows else next(iter(lean.values()))
    wanted = data_config(reference)
    for name, model in lean.items():  # a page shows, and measures all models on, one set of images
        if (own := data_config(model)) != wanted:
            raise ConfigError(
                f"{name} prepares images otherwise than the dense model ({own}, not {wanted}), and a page has one set "
                "of images; leanvit compare measures them"
            )
    data = open_data(path, reference, **opening)
    subset = Subset(data, sorted({*_spread(len(data), most)}))
    if knows:
        table = compare(dense, lean, subset, images=subset, **timing)  # what adapts is timed on real images
    else:
        table = _without_reference(dense, lean, subset, timing)
    page = page_of(dense if knows else None, lean, table, source, progress=timing["progress"])
    notes = [f"Accuracy on {page.count} of the {len(data)} images, evenly spread."] if len(subset) < len(data) else []
    if damage := report_damage(data):
        notes.append(damage)
    missing = [] if knows else ["The dense model's weights are not known, so its accuracy is not: give --teacher."]
    costs = page.costs if knows else {DENSE: count(dense), **page.costs}
    return replace(page, costs=costs, sources=[replace(source, notes=notes)], missing=missing)


def _without_reference(
    dense: nn.Module, lean: Mapping[str, nn.Module], data: Subset[Any], timing: Mapping[str, Any]
) -> Comparison:
    """A comparison with a dense model of random weights: its speed holds, its accuracy does not."""
    fast = {name: deployed_form(model) for name, model in lean.items()}
    results = {
        name: evaluate(model, data, device=timing["device"], progress=timing["progress"])
        for name, model in fast.items()
    }
    rows = bench({DENSE: dense, **fast}, images=data, precisions=("fp32",), **timing)
    for row in rows:
        if row["model"] in results:
            row |= results[row["model"]].row()
    return Comparison(rows, results=results, images=data)


def _recorded(runs: Sequence[Run], dense: nn.Module, now: Source, timing: Mapping[str, Any]) -> Page:
    rows: list[Row] = []
    sources: list[Source] = []
    for run in runs:
        if run.results.get("rows"):
            rows += [{**row, "source": len(sources)} for row in _own_rows(run)]
            sources.append(_results_source(run))
    timed = {run.name: run.model for run in runs if not run.results.get("rows")}
    missing = ["No photos: give --data-dir to see what the model makes of them, and to measure accuracy now."]
    if timed:
        fresh = bench({DENSE: dense, **timed}, precisions=("fp32",), **timing)
        rows += [{**row, "source": len(sources)} for row in fresh]
        sources.append(now)
        missing.append(f"No accuracy of {', '.join(timed)}: there is no results.json in the folder.")
    costs = {DENSE: count(dense), **{run.name: count(run.model) for run in runs}}
    models = {run.name: about(run.model) for run in runs}
    return Page(models=models, rows=rows, costs=costs, sources=sources, missing=missing)


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """What the folders hold; names are as short as tells them apart."""
    folders = [Path(path).expanduser() for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is given more than once")
    return [
        Run(
            name=name,
            path=folder,
            model=resolve_model(str(folder)),
            results=_results(folder / "results.json"),
            settings=_settings(folder / "args.yaml"),
            curves=read_csv(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else (),
        )
        for name, folder in zip(short_names(folders), folders, strict=True)
    ]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Names for the models in some folders, as short as tells them apart from one another and from the dense one."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 and name != DENSE else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _results(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise ConfigError(f"{file} cannot be read: {reason}") from reason
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise ConfigError(f"{file} holds no rows of figures; remove it to have them measured")
    return found


def _settings(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as reason:
        raise ConfigError(f"{file} cannot be read: {reason}") from reason
    return found if isinstance(found, dict) else {}


def find_dense(runs: Sequence[Run], teacher: str | None) -> tuple[nn.Module, bool]:
    """The dense model to compare with, and whether it has its weights.

    The teacher if one is named, else a dense run among those given, else the model that a lean run was made from
    where its folder is still there, else one of the same architecture with random weights: good for time and cost.
    """
    lean = next(run for run in runs if run.is_lean)
    if teacher is not None:
        return resolve_model(teacher, pretrained=True), True
    for run in runs:
        if not run.is_lean:
            return run.model, True
    origin = (lean.results.get("settings") or {}).get("model")
    if isinstance(origin, str) and Path(origin).is_dir():
        try:
            return resolve_model(origin), True
        except LeanVitError:
            pass  # it is no longer what it was
    architecture: str = lean.model.pretrained_cfg["architecture"]
    return timm.create_model(architecture, **model_arguments(lean.model)).eval(), False


def _own_rows(run: Run) -> list[Row]:
    """The rows of a run's results: those of its model, called as the run is, and those of the dense one beside it.

    Where the results compare several lean models, the run's is the one of its name, else of its method.
    """
    rows: Sequence[Row] = run.results["rows"]
    own = [row for row in rows if not _is_dense(row)]
    if len({row["model"] for row in own}) > 1:
        method = str(getattr(run.model, "lean", DENSE))
        own = [row for row in own if row["model"] == run.name] or [row for row in own if row.get("method") == method]
    called = {False: run.name, True: DENSE}
    return [{**row, "model": called[_is_dense(row)]} for row in rows if _is_dense(row) or row in own]


def _is_dense(row: Row) -> bool:
    return row.get("method") == DENSE or row["model"] == DENSE


def _results_source(run: Run) -> Source:
    found = run.results
    settings = found.get("settings") or {}
    known = found.get("environment") or {}
    notes = []
    made_with = (known.get("versions") or {}).get("leanvit")
    ours = environment()["versions"].get("leanvit")
    if not made_with:
        notes.append("It was not recorded which version of leanvit measured this.")
    elif made_with != ours:
        notes.append(f"Measured with leanvit {made_with}; this page was made with {ours}.")
    return Source(
        title=str(run.path / "results.json"),
        command=found.get("command_line") or f"leanvit {found.get('command', '…')} (the full line was not recorded)",
        settings={name: value for name, value in settings.items() if value not in (None, "", [])},
        seed=settings.get("seed"),
        environment=machine(known),
        notes=notes,
    )


def _training(run: Run) -> Source:
    return Source(
        title=f"training of {run.name} ({run.path / 'args.yaml'})",
        command=run.results.get("command_line") or "",
        seed=run.settings.get("seed"),
        settings={name: value for name, value in run.settings.items() if value not in (None, "", [])},
        environment=machine(run.results.get("environment") or {}),
    )


def machine(known: Mapping[str, Any]) -> dict[str, Any]:
    """Machine and versions for people."""
    names = ("date", "processor", "cores", "gpus", "cpu_capability", "platform", "python")
    return {name: known[name] for name in (*names, "versions") if known.get(name)}
