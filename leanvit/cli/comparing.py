"""`leanvit pareto`: a set of runs in the same axes, with the dense model and what one would do without leanvit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from ..errors import ConfigError
from .app import app
from .options import Config, EvalData, ModelChoice, Overwrite, Timing, check_output, takes_groups
from .printing import say, show

INCOMPLETE = 1
"""Exit code when a run was left out."""


@app.command()
@takes_groups
def pareto(
    ctx: typer.Context,
    choice: ModelChoice,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Runs or saved models.", show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Also MODEL with it, untrained; may be repeated.")
    ] = None,
    peer_img_size: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Also MODEL on smaller images; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where table and plots go.")] = Path("pareto"),
    overwrite: Overwrite = False,
    config: Config = None,
    *,
    data: EvalData,
    timing: Timing,
) -> None:
    """Draw runs, MODEL and its peers in the same axes.

    Accuracy against throughput in each engine, and against MACs, with the frontier. The set can be a YAML file
    (--config). A run that is not complete is named and left out; the exit code is 1 then.
    """
    from ..measure import environment
    from ..methods import parse
    from ..model import slim
    from ..pareto import measure, plots
    from ..report.gather import short_names
    from ..runs import unfinished
    from ..store import resolve_model

    check_output(output, ["results.csv", "results.json", "pareto-*.png"], overwrite)
    left_out = {run: reason for run in runs or () if (reason := unfinished(run))}
    for run, reason in left_out.items():
        say(f"{run} is left out: {reason}")
    complete = [run for run in runs or () if run not in left_out]
    dense = choice.load()
    models: dict[str, nn.Module] = {"dense": dense}
    for size in peer_img_size or ():
        models[f"dense, {size} px"] = replace(choice, img_size=size).load()
    for text in method or ():
        models[text] = slim(dense, *parse(text), images=data.open(dense) if data.val_split else data.data_dir)
    folders = [Path(run).expanduser() for run in complete]
    models |= {name: resolve_model(str(folder)) for name, folder in zip(short_names(folders), folders, strict=True)}
    if len(models) < 2:
        raise ConfigError("nothing to compare with: no complete run, no --method and no --peer-img-size")
    if len(models) <= len(complete) + len(method or ()) + len(peer_img_size or ()):
        raise ConfigError("a run, a method or a size is given more than once")
    for model in models.values():
        data.crop(model)
    table = measure(
        models,
        data.data_dir,
        split=data.val_split,
        class_map=data.class_map,
        workers=data.workers,
        **timing.arguments(),
    )
    show(table)
    table.to_csv(output / "results.csv")
    table.to_json(output / "results.json", command="pareto", left_out=left_out, environment=environment())
    plots(table, output)
    say(f"results.csv, results.json, pareto-throughput.png and pareto-macs.png are in {output}/")
    if left_out:
        say(f"{len(left_out)} of {len(runs or ())} runs were left out: {', '.join(left_out)}")
        raise typer.Exit(INCOMPLETE)
