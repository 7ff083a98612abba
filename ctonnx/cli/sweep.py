"""`ctonnx sweep`."""

import warnings
from typing import TYPE_CHECKING

import click

from . import options
from .output import echo, print_json, progress, say
from .tables import columns, difference, interval, mark

if TYPE_CHECKING:
    from ..measure.results import Sweep


@click.command()
@options.model
@click.option(
    "--data", "dataset", metavar="DATA", required=True, help="What to measure on: see above."
)
@options.labels
@options.betas
@click.option(
    "--coeff",
    "coeffs",
    metavar="GRID",
    help="Values of the paper's c to try with each.  [default: the model's, or 0.5]",
)
@click.option(
    "--metric",
    metavar="NAME|PKG:FUNCTION",
    default="accuracy",
    show_default=True,
    help="accuracy, top5 (or another number), f1, nll, ece, miou, mse, mae, r2, agreement, "
    "entropy, kl, curvature (or curvature:RADIUS), or a function of yours.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "racing"]),
    default="grid",
    show_default=True,
    help="All points on all data, or drop what is significantly worse on growing subsets.",
)
@click.option(
    "--confidence", type=float, default=0.95, show_default=True, help="Confidence of racing."
)
@click.option(
    "--tolerance",
    metavar="NUMBER",
    type=float,
    help="Take the smallest beta that is worse than the original by no more than this.",
)
@click.option(
    "--per",
    type=click.Choice(["stage", "activation"]),
    help="Then look for a beta of each of these, one after the other.",
)
@click.option(
    "--output-name",
    metavar="NAME",
    help="The output to measure.  [default: the first that suits the metric and the labels]",
)
@options.feeding
@options.calibrating
@options.providers
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run here, or on an existing Ray cluster.",
)
@click.option("--address", help="Ray cluster address.  [default: what Ray finds]")
@click.option(
    "--gpus", type=click.FloatRange(0), default=0, show_default=True, help="GPUs per task on Ray."
)
@click.option(
    "-o", "--output", metavar="FILE", help="Write the points to a .csv, .json or .parquet file."
)
@click.option("--resume", is_flag=True, help="Continue the interrupted sweep of this --output.")
@click.option(
    "--plot",
    "drawing",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Draw the curve, or with --per beta against depth: into a .png or .svg file, or here.",
)
@click.option("--save-best", metavar="FILE", help="Write the model with the best beta.")
@click.option(
    "--beta-as",
    type=click.Choice(["initializer", "input"]),
    help="As for patch, in what --save-best writes.  [default: initializer]",
)
@options.force
@options.json
def sweep(model, drawing, save_best, beta_as, as_json, feeding, **choices):
    """Find the beta that serves your data: measure MODEL at each.

    DATA is an .npz file (inputs by name, labels), .npy (with --labels another), .csv (features
    under a header, or path and label of images), a folder of images with one sub-folder per class,
    or PKG:FACTORY, a function that gives an iterable of (inputs, labels).

    A GRID is FIRST:LAST:STEP, a number, or a list of these with commas.
    """
    from ..measure import sweeping

    picture = None if drawing == "-" else drawing
    output, force = choices["output"], choices["force"]
    _check(model, drawing, save_best, beta_as, **choices)
    result = _measure(model, feeding, **choices)
    if picture is not None:
        result.plot(picture)
    if save_best is not None:
        sweeping.save_best(
            model, result, save_best, beta_as or "initializer", force, choices["calibration"]
        )
    for note in result.notes:
        say(note)
    if save_best is not None and not result.grouped and result.best is result.original:
        say(f"the original is best: {save_best} computes the same, with CT units at beta 1")
    if as_json:
        print_json(output, **result.document())
        return
    for line in columns(_rows(result)):
        click.echo(line)
    if drawing == "-":
        click.echo(result.plot())
    for line in verdict(result).splitlines():
        echo(None, line)
    if result.grouped is not None:
        for line in columns(_part_rows(result)):
            click.echo(line)
        echo(None, _grouped_verdict(result))
    for path in filter(None, (output, save_best, picture)):
        say(f"wrote {path}")


def _check(model, drawing, save_best, beta_as, **choices):
    """Refuse, before anything runs, options that do not go together and outputs in the way."""
    from ..calibration.calibrate import check_calibration
    from ..measure import plot
    from ..model import files
    from ..ort import library

    output, picture = choices["output"], None if drawing == "-" else drawing
    if model == files.STDIO:
        raise click.UsageError("a sweep takes the model's file, not -")
    if choices["resume"] and output is None:
        raise click.UsageError("--resume goes with -o: progress is kept beside the output")
    if beta_as is not None and save_best is None:
        raise click.UsageError("--beta-as goes with --save-best: it is how that is written")
    if beta_as == "input" and choices["per"] is not None:
        raise click.UsageError("--beta-as input takes one beta for all: leave out --per")
    if choices["calibration"] is not None:
        check_calibration(choices["calibration"], beta_as or "initializer")
    if drawing is not None:
        plot.check_drawing(picture)
    for path in filter(None, (save_best, picture)):
        files.check_output(path, choices["force"])
    outputs = {"--output": output, "--save-best": save_best, "--plot": drawing}
    inputs = {"--data": choices["dataset"], "--calibrate": options.data_of(choices["calibration"])}
    options.check_outputs(outputs, inputs)
    if not library.has_library():
        say("the op library is not installed: the model runs as its fallback")


def _measure(model, feeding, **choices):
    """The Sweep; an interrupted one says how to continue."""
    from ..measure import sweeping

    journal = sweeping.progress_path(choices["output"])
    before = _size(journal)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "running without fast kernels")
            return sweeping.sweep(
                model, progress=progress("sweeping", rated=True), **feeding, **choices
            )
    except BaseException:
        if _size(journal) > before:
            say(f"progress saved in {journal}; continue with --resume")
        raise


def _size(path):
    return path.stat().st_size if path is not None and path.exists() else 0


def _rows(result):
    """The rows of a table with one for each point."""
    yield "", "BETA", "C", result.metric.upper(), "SE", "GAIN", "95 %", "SAMPLES"
    most = max(point.samples for point in result.points)
    raced = any(point.samples != most for point in result.points)
    form = _format(result)
    for point in result.points:
        yield (
            mark(point, result),
            f"{point.beta:g}",
            "" if point.coeff is None else f"{point.coeff:g}",
            f"{point.value:{form}}",
            f"{point.error:{form}}",
            *(("", "") if point is result.original else interval(point, form)),
            str(point.samples) if raced else "",
        )


def _part_rows(result):
    """The rows of a table with one for each stage or activation."""
    yield result.grouped.per.upper(), "ACTIVATIONS", "BETA", "C", "PART OF THE GAIN", "95 %"
    form = _format(result)
    for part in result.grouped.parts:
        unlike = part.part or part.part_low or part.part_high
        shown = difference(part.part, part.part_low, part.part_high, form)
        yield (
            part.name,
            "" if result.grouped.per == "activation" else str(len(part.activations)),
            f"{part.beta:g}",
            "" if part.coeff is None else f"{part.coeff:g}",
            *(shown if unlike else ("", "")),
        )


def _grouped_verdict(result):
    """The line on what a beta of each stage or activation gains."""
    grouped, form = result.grouped, _format(result)
    gain, ends = interval(grouped, form)
    ends_of_single = grouped.over_single_low, grouped.over_single_high
    over, over_ends = difference(grouped.over_single, *ends_of_single, form)
    return (
        f"per {grouped.per}: {result.metric} {grouped.value:{form}}, gain over the original {gain} "
        f"(95 %: {ends}), over one beta {over} (95 %: {over_ends}), "
        f"the best of {grouped.combinations} points"
    )


def _format(result):
    """A format for numbers of the metric's size."""
    largest = max((abs(p.value) for p in result.points if p.value == p.value), default=0)
    return ".4f" if 0.01 <= largest < 1e5 or not largest else ".3e"


def verdict(result: "Sweep") -> str:
    """The last lines of a sweep: the best beta, its gain, and what a race is sure of."""
    best, form = result.best, _format(result)
    coeff = "" if best.coeff is None else f", c {best.coeff:g}"
    value = f"{best.value:{form}} on {best.samples} samples"
    kind = "best beta"
    if result.tolerance is not None:
        kind = f"smallest beta within {result.tolerance:g} of the original is"
    line = f"{kind} {best.beta:g}{coeff}: {result.metric} {value}"
    if best is result.original:
        line += ", the original"
    else:
        gain, ends = interval(best, form)
        line += f", gain over the original {gain} (95 %: {ends})"
    if result.race:
        race = result.race
        line += f"\nracing: {race.passes} of {race.grid_passes} runs, {len(race.left)} left; "
        if race.confidence is None:
            return line + "on the first batches, which tell nothing certain of the others"
        about = "about " if race.approximate else ""
        line += (
            f"the grid's best is at most {race.within:{form}} better "
            f"({about}{100 * race.confidence:g} % confidence)"
        )
    return line
