"""The command line: parse, call, print. Only this file knows click."""

import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import click

from ..errors import CheckFailed, CtonnxError

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="ctonnx")
@click.pass_context
def cli(context):
    """Steer ONNX models by one number: Curvature Tuning (arXiv 2502.07783) without training."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _list(context, option, value):
    """A list of names from text with commas."""
    return None if value is None else [name.strip() for name in value.split(",")]


# As typed, for a Path would drop the slash that ends a folder's name, and take `./-` for `-`.
# Whether it can be read is for the code that reads it to say.
_model = click.argument("model")
_output = click.option(
    "-o", "--output", metavar="FILE", help="Where to write; - for standard output."
)
_force = click.option("--force", is_flag=True, help="Overwrite an existing output.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@cli.command()
@_model
@click.option("--beta", type=float, help="Curvature in [0, 1]; 1 is the original.")
@click.option(
    "--coeff", type=float, default=0.5, show_default=True, help="The paper's c, in [0, 1]."
)
@_output
@click.option(
    "--beta-as",
    type=click.Choice(["initializer", "input", "required-input"]),
    default="initializer",
    show_default=True,
    help="Bake beta in, or make it a graph input: optional, or one that must be fed.",
)
@click.option(
    "--lowering",
    type=click.Choice(["portable", "op", "primitives"]),
    default="portable",
    show_default=True,
    help="CTU nodes with a fallback function, CTU nodes alone, or standard ops alone.",
)
@click.option(
    "--ops",
    metavar="LIST",
    callback=_list,
    help="Op types to steer.  [default: relu, leakyrelu, prelu, clip, hardsigmoid, max, min]",
)
@click.option("--include", metavar="REGEX", help="Steer only nodes whose name matches.")
@click.option("--exclude", metavar="REGEX", help="Leave out nodes whose name matches.")
@click.option(
    "--params",
    "params_file",
    metavar="FILE",
    help="Beta and c of single activations, per channel too, by name or regular expression: .json "
    "or .npz; or a T-CT state dict: .pth.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Before writing, compare it with the original at beta 1, and kernel with fallback.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@_force
@_json
def patch(model, beta, coeff, params_file, output, check, dry_run, force, as_json, **choices):
    """Steer MODEL: write a copy with CT units for activations.

    MODEL is a file, or - for standard input. Written is --output, or else X.ct.onnx beside X.onnx,
    and standard output for -.
    """
    from .. import api
    from ..check import validate
    from ..measure import results
    from ..model import files
    from ..ort import library
    from ..rewriting import params, rewrite

    if beta is None and params_file is None:
        raise click.UsageError("Missing option '--beta', or '--params'")
    given = None if params_file is None else params.load(params_file)

    def steer(proto):
        return rewrite.steer(proto, beta, coeff, params=given, **choices)

    def verify(report, path):
        checks.update(validate.check_steered(model, path, report, beta, choices["lowering"]))

    checks = {}
    if dry_run and check:
        raise click.UsageError("--check runs what is written: it does not go with --dry-run")
    over_itself = output not in (None, "-") and Path(output).resolve() == Path(model).resolve()
    if over_itself and choices["lowering"] == "primitives":
        raise click.UsageError("primitives cannot be undone: write to another file than MODEL")
    report, output = files.edit(
        model,
        steer,
        api.steered_path if output is None else output,
        force or dry_run,
        verify if check else None,
        _progress(),
        write=not dry_run,
    )
    if choices["lowering"] == "portable" and not library.has_library():
        report.notes.append("the op library is not installed: here the model runs as its fallback")
    _say_of(report, as_json)
    if as_json:
        _print_json(
            output,
            written=not dry_run,
            replaced=[_as_json(a) for a in report.replaced],
            skipped=[_as_json(a, "reason") for a in report.skipped],
            notes=report.notes,
            checks=[
                {"check": name, **results.without_nan(asdict(comparison))}
                for name, comparisons in checks.items()
                for comparison in comparisons
            ],
        )
        return
    for name, comparisons in checks.items():
        kind, worst = "relative", max(c.max_rel for c in comparisons)
        if not math.isfinite(worst):  # All that an output must be is 0.
            kind, worst = "absolute", max(c.max_abs for c in comparisons)
        _say(f"check passed: {name}, largest {kind} difference {worst:.1e}")
    at = f"{beta:.12g}" if given is None else "per activation"
    done = "would write" if dry_run else "wrote"
    _echo(output, f"{done} {output}: {_counts(report)} at beta {at}")


@cli.command()
@_model
@_json
def inspect(model, as_json):
    """List the activations of MODEL, and their state.

    MODEL is a file, or - for standard input. An activation is steered, steerable or, with the
    reason, skipped.
    """
    from .. import api

    activations = api.inspect(model)
    if as_json:
        fields = ("status", "reason", "beta", "coeff", "shape", "module")
        _print_json(activations=[_as_json(a, *fields) for a in activations])
        return
    counts = Counter(a.status for a in activations)
    for line in _table(activations):
        click.echo(line)
    states = ("steered", "steerable", "skipped")
    click.echo(", ".join(f"{counts[state]} {state}" for state in states))


_COLORS = {"steered": "green", "steerable": "cyan", "skipped": "yellow", "*": "green"}


def _table(activations):
    """The lines of a table with a row for each activation."""
    rows = [("STATE", "OP", "SHAPE", "NAME", "MODULE", "SCOPE", "")] if activations else []
    for a in activations:
        shape = "" if a.shape is None else ",".join("?" if d is None else str(d) for d in a.shape)
        rows.append((a.status, a.op, shape, a.name, a.module or "", a.scope, _detail(a)))
    yield from _columns(rows)


def _columns(rows):
    """The lines of rows of text in columns under their titles; empty columns are left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    plain = "NO_COLOR" in os.environ
    for row in zip(*kept, strict=True):
        first, *rest = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        color = None if plain else _COLORS.get(row[0])
        yield "  ".join([click.style(first, fg=color) if color else first, *rest]).rstrip()


def _detail(activation):
    if activation.status == "skipped":
        return activation.reason
    if activation.status == "steerable":
        return ""
    coeff = "" if activation.coeff in (None, 0.5) else f", c {_number(activation.coeff)}"
    return f"beta {_number(activation.beta)}{coeff}"


def _number(value):
    if isinstance(value, list):
        return "per channel"
    return "fed" if value is None else format(value, ".12g")


@cli.command("set")
@_model
@click.option("--beta", type=float, required=True, help="The new beta, in [0, 1].")
@_output
@_force
@_json
def set_(model, beta, output, force, as_json):
    """Change the beta of a steered MODEL.

    MODEL is a file, or - for standard input. Written is --output, or else MODEL itself.
    """
    from ..model import files
    from ..rewriting import rewrite

    held, written = files.edit(
        model,
        lambda proto: rewrite.set_beta(proto, beta),
        model if output is None else output,
        force or output is None,
        progress=_progress(),
    )
    if held > 1:
        _say(f"all activations have it now, in place of {held} betas")
    if as_json:
        _print_json(written, beta=beta)
    else:
        _echo(written, f"wrote {written}: beta {beta:.12g}")


@cli.command()
@_model
@_output
@_force
@_json
def unpatch(model, output, force, as_json):
    """Give back the original of a steered MODEL.

    MODEL is a file, or - for standard input. Written is --output, or else X.onnx beside X.ct.onnx,
    and standard output for -.
    """
    from .. import api
    from ..model import files
    from ..rewriting import rewrite

    _, written = files.edit(
        model,
        rewrite.unsteer,
        api.original_path if output is None else output,
        force,
        progress=_progress(),
    )
    if as_json:
        _print_json(written)
    else:
        _echo(written, f"wrote {written}: unsteered")


def _numbers(context, option, value):
    """A tuple of numbers from a list with commas."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers") from None


def _check_outputs(written, read):
    """Raise where one of the files written, option -> path, is another of them or one read."""
    seen = {Path(path).resolve(): name for name, path in read.items()}
    for name, path in written.items():
        if path not in (None, "-") and seen.setdefault(Path(path).resolve(), name) != name:
            raise click.UsageError(f"{name} and {seen[Path(path).resolve()]} name one file")


def _options(*options):
    """A decorator that gives a command several options, in that order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_labels = click.option(
    "--labels", metavar="NAME", help="Array or column of the labels, or a .npy file."
)
_betas = click.option(
    "--beta",
    "betas",
    metavar="GRID",
    default="0.7:1.0:0.01",
    show_default=True,
    help="What to try; the original, at 1, is tried too.",
)
_providers = click.option(
    "--providers",
    metavar="LIST",
    callback=_list,
    help="ONNX Runtime's execution providers.  [default: all that are there but TensorRT's]",
)
# How data become batches.
_feeding = _options(
    click.option("--batch", "batch_size", type=int, help="Samples per run.  [default: 32]"),
    click.option(
        "--preset",
        metavar="NAME",
        help="How images are fed: plain, imagenet or caffe.  [default: plain]",
    ),
    click.option("--resize", type=int, help="Scale the shorter side of images to this."),
    click.option("--crop", type=int, help="Keep the middle, of this height and width."),
    click.option(
        "--mean",
        metavar="NUMBERS",
        callback=_numbers,
        help="Taken from pixels in [0, 1]: one number, or R,G,B.",
    ),
    click.option(
        "--std",
        metavar="NUMBERS",
        callback=_numbers,
        help="What they are then divided by, likewise.",
    ),
    click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read."),
)


def _transform(preset, **given):
    """The images.Transform that the options ask for; None where none does."""
    from ..data import images

    if preset is None and all(value is None for value in given.values()):
        return None
    return images.transform(preset or "plain", **given)


@cli.command()
@_model
@click.option(
    "--data", "dataset", metavar="DATA", required=True, help="What to measure on: see above."
)
@_labels
@_betas
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
    "entropy, kl, or a function of yours.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "racing"]),
    default="grid",
    show_default=True,
    help="All points on all data, or drop what is significantly worse on growing subsets.",
)
@click.option(
    "--confidence", type=float, default=0.95, show_default=True, help="Of what racing finds."
)
@_feeding
@_providers
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run here, or on an existing Ray cluster.",
)
@click.option("--address", help="Of the Ray cluster.  [default: what Ray finds]")
@click.option(
    "--gpus", type=click.FloatRange(0), default=0, show_default=True, help="GPUs per task on Ray."
)
@click.option(
    "-o", "--output", metavar="FILE", help="Write the points to a .csv, .json or .parquet file."
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted sweep of this --output.")
@click.option(
    "--plot",
    "drawing",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Draw the curve: into a .png or .svg file, or here, as text.",
)
@click.option("--save-best", metavar="FILE", help="Write the model with the best beta.")
@click.option(
    "--beta-as",
    type=click.Choice(["initializer", "input"]),
    help="As for patch, in what --save-best writes.  [default: initializer]",
)
@_force
@_json
def sweep(
    model,
    dataset,
    output,
    resume,
    drawing,
    save_best,
    beta_as,
    preset,
    resize,
    crop,
    mean,
    std,
    force,
    as_json,
    **choices,
):
    """Find the beta that serves your data: measure MODEL at each.

    DATA is an .npz file (inputs by name, labels), .npy (with --labels another), .csv (features
    under a header, or path and label of images), a folder of images with one sub-folder per class,
    or PKG:FACTORY, a function that gives an iterable of (inputs, labels).

    A GRID is FIRST:LAST:STEP, a number, or a list of these with commas.
    """
    from ..measure import plot, sweeping
    from ..model import files
    from ..ort import library

    if model == files.STDIO:
        raise click.UsageError("a sweep takes the model's file, not -")
    if resume and output is None:
        raise click.UsageError("--resume goes with -o: progress is kept beside the output")
    if beta_as is not None and save_best is None:
        raise click.UsageError("--beta-as goes with --save-best: it is how that is written")
    transform = _transform(preset, resize=resize, crop=crop, mean=mean, std=std)
    if drawing is not None:
        plot.check(None if drawing == "-" else drawing)
    for path in filter(None, (save_best, None if drawing == "-" else drawing)):
        files.check_output(path, force)
    written = {"--output": output, "--save-best": save_best, "--plot": drawing}
    _check_outputs(written, {"--data": dataset})
    if not library.has_library():
        _say("the op library is not installed: the model runs as its fallback")
    kept = sweeping.progress_path(output)
    before = _size(kept)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "running without fast kernels")
            result = sweeping.sweep(
                model,
                dataset,
                images=transform,
                output=output,
                force=force,
                resume=resume,
                progress=_progress("sweeping", rated=True),
                **choices,
            )
    except BaseException:
        if _size(kept) > before:
            _say(f"what is measured is kept in {kept}: --resume goes on")
        raise
    if drawing not in (None, "-"):
        result.plot(drawing)
    if save_best is not None:
        sweeping.save_best(model, result, save_best, beta_as or "initializer", force)
    for note in result.notes:
        _say(note)
    if save_best is not None and result.best is result.original:
        _say(f"the original is best: {save_best} computes the same, with CT units at beta 1")
    if as_json:
        _print_json(output, **result.document())
        return
    for line in _points_table(result):
        click.echo(line)
    if drawing == "-":
        click.echo(result.plot())
    click.echo(_verdict(result))
    for path in filter(None, (output, save_best, None if drawing == "-" else drawing)):
        _say(f"wrote {path}")


def _size(path):
    return path.stat().st_size if path is not None and path.exists() else 0


def _points_table(result):
    """The lines of a table with a row for each point."""
    rows = [("", "BETA", "C", result.metric.upper(), "ERROR", "GAIN", "95 %", "SAMPLES")]
    most = max(point.samples for point in result.points)
    form = _form(result)
    for point in result.points:
        mark = "*" if point is result.best else "=" if point is result.original else ""
        gain = (f"{point.gain:+{form}}", f"{point.gain_low:+{form}} to {point.gain_high:+{form}}")
        coeff = "" if point.coeff is None else f"{point.coeff:g}"
        samples = "" if all(p.samples == most for p in result.points) else str(point.samples)
        value = (f"{point.value:{form}}", f"{point.error:{form}}")
        at_one = point is result.original
        rows.append(
            (mark, f"{point.beta:g}", coeff, *value, *(("", "") if at_one else gain), samples)
        )
    return _columns(rows)


def _form(result):
    """How numbers of the metric's size are written."""
    largest = max((abs(p.value) for p in result.points if p.value == p.value), default=0)
    return ".4f" if 0.01 <= largest < 1e5 or not largest else ".3e"


def _verdict(result):
    best, form = result.best, _form(result)
    coeff = "" if best.coeff is None else f", c {best.coeff:g}"
    value = f"{best.value:{form}} on {best.samples} samples"
    line = f"best beta {best.beta:g}{coeff}: {result.metric} {value}"
    if best is result.original:
        line += ", the original"
    else:
        interval = f"{best.gain_low:+{form}} to {best.gain_high:+{form}}"
        line += f", gain over the original {best.gain:+{form}} (95 %: {interval})"
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


@cli.command()
@_model
@click.option("--train", metavar="DATA", required=True, help="To fit on and to choose beta on.")
@click.option("--test", metavar="DATA", required=True, help="To measure on alone.")
@_labels
@click.option("--test-labels", metavar="NAME", help="The same for --test.  [default: as --labels]")
@_betas
@click.option("--coeff", type=float, help="The paper's c.  [default: the model's own, or 0.5]")
@click.option(
    "--features",
    metavar="TENSOR",
    help="What to fit on.  [default: the input of the last linear layer]",
)
@click.option("--seeds", type=int, default=3, show_default=True, help="Splits to choose beta on.")
@click.option(
    "--validation", type=float, default=0.2, show_default=True, help="Share of --train for that."
)
@_feeding
@_providers
@click.option("-o", "--output", metavar="FILE", help="Where to write the model.")
@click.option("--points", metavar="FILE", help="Write the points: .csv, .json or .parquet.")
@_force
@_json
def probe(model, output, points, preset, resize, crop, mean, std, force, as_json, **choices):
    """Give MODEL other classes: a new linear head, and the beta that serves it.

    At each beta a linear head is fitted on the features in front of the classifier. Beta is chosen
    on a part of the training set, and the test set compares it with beta 1, plain linear probing.
    Written is --output, or else X.probe.onnx beside X.onnx: the model with that beta and its head.

    DATA and GRID are as for sweep.
    """
    from ..measure import results
    from ..model import files
    from ..ort import library
    from ..transfer import probing

    if files.STDIO in (model, output):
        raise click.UsageError("a probe takes the model's file, and writes one, not -")
    output = output or Path(f"{model.removesuffix('.onnx')}.probe.onnx")
    if points is not None:
        results.check_format(points)
        files.check_output(points, force)
    read = {"MODEL": model, "--train": choices["train"], "--test": choices["test"]}
    _check_outputs({"--output": output, "--points": points}, read)
    if not library.has_library():
        _say("the op library is not installed: the model runs as its fallback")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "running without fast kernels")
        result = probing.probe(
            model,
            images=_transform(preset, resize=resize, crop=crop, mean=mean, std=std),
            output=output,
            force=force,
            progress=_progress("probing"),
            **choices,
        )
    if points is not None:
        result.write(points)
        _say(f"wrote {points}")
    for note in result.notes:
        _say(note)
    if as_json:
        _print_json(output, **result.document())
        return
    click.echo(
        f"{result.width} features {result.features!r}, {len(result.classes)} classes, "
        f"{result.train_samples} training and {result.test_samples} test samples"
    )
    for line in (*_columns(_probed(result)), *_columns(_chosen(result))):
        click.echo(line)
    click.echo(
        f"accuracy {result.accuracy:.4f}, linear probing {result.original.test:.4f}: gain "
        f"{result.gain:+.4f} (95 %: {result.gain_low:+.4f} to {result.gain_high:+.4f})"
    )
    click.echo(f"wrote {output}: beta {result.best.beta:g}, test accuracy {result.written:.4f}")


def _probed(result):
    """The rows of the table of a probe's points."""
    yield "", "BETA", "VALIDATION", "TEST", "GAIN", "95 %"
    for p in result.points:
        mark = "*" if p is result.best else "=" if p is result.original else ""
        gain = (f"{p.gain:+.4f}", f"{p.gain_low:+.4f} to {p.gain_high:+.4f}")
        gain = ("", "") if p is result.original else gain
        yield mark, f"{p.beta:g}", f"{p.validation:.4f}", f"{p.test:.4f}", *gain


def _chosen(result):
    """The rows of the table of what each seed chose."""
    yield "SEED", "BETA", "VALIDATION", "TEST", "GAIN"
    for s in result.seeds:
        numbers = (f"{s.validation:.4f}", f"{s.test:.4f}", f"{s.gain:+.4f}")
        yield str(s.seed), f"{s.beta:g}", *numbers


@cli.command()
@_model
@click.option(
    "--against",
    metavar="ORIGINAL",
    help="Compare with this unsteered model, at beta 1.  [default: with a float64 run]",
)
@click.option(
    "--torch",
    "module",
    metavar="PKG:FACTORY",
    help="Compare with this PyTorch model, as for `ctonnx export`, steered alike.",
)
@click.option("--inputs", metavar="FILE", help="An .npz file of inputs.  [default: random ones]")
@click.option(
    "--shape",
    "shapes",
    metavar="INPUT=DIMS",
    multiple=True,
    help="Size of a random input, such as image=1x3x224x224; repeatable.",
)
@click.option(
    "--providers",
    metavar="LIST",
    callback=_list,
    default="CPUExecutionProvider",
    show_default=True,
    help="ONNX Runtime's execution providers, each in turn.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(0),
    help="Allowed difference, as a part of an output's largest value.  [default: for float32 1e-4 "
    "from a float64 run, else 1e-5]",
)
@click.option(
    "--atol", type=click.FloatRange(0), help="Allowed difference besides.  [default: 1e-6]"
)
@_json
def validate(model, shapes, as_json, **options):
    """Show that MODEL computes what the method says.

    Each output that it gives in ONNX Runtime is compared with that of a float64 run, or of another
    model: with the op library, without it, and in the blocked layout where `ctonnx.session` uses
    that. Beside a float64 run, its CT units are also tried by themselves, on inputs of their own.
    MAX REL is the largest difference over the largest value, ULP the largest difference in units of
    the last place.
    """
    from ..check.validate import validate
    from ..measure.results import without_nan

    result = validate(model, shapes=dict(map(_named_sizes, shapes)), **options)
    for note in result.notes:
        _say(note)
    if as_json:
        _print_json(
            ok=result.ok,
            against=result.against,
            inputs=result.inputs,
            outputs=[
                {"run": run.name, **without_nan(asdict(output))}
                for run in result.runs
                for output in run.outputs
            ],
            diverges={run.name: run.diverges for run in result.runs if run.diverges},
            notes=result.notes,
        )
    else:
        on = ", ".join(f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in result.inputs.items())
        click.echo(f"compared with {result.against}, on {on}")
        for run in result.runs:
            click.echo(f"{run.name}: {'passed' if run.ok else 'FAILED'}")
            for line in _columns(_measurements(run)):
                click.echo(f"  {line}")
    for run in result.runs:
        for output in run.outputs:
            if not output.ok:
                _say(f"{run.name}: {output.name!r} {output.reason}")
        if run.diverges:
            _say(f"{run.name}: the first activation to differ is {run.diverges}")
    if not result.ok:
        sys.exit(CheckFailed.exit_code)


def _sizes(option, text, names=False):
    """The numbers in `1x3x224x224`, and names if there may be any."""
    sizes = [int(size) if size.isdecimal() else size for size in text.split("x")]
    if not all(size and (type(size) is int or (names and size.isidentifier())) for size in sizes):
        raise click.UsageError(f"--{option} {text}: expected sizes like 1x3x224x224")
    return sizes


def _named_sizes(text):
    """The name and the sizes in `image=1x3x224x224`."""
    name, equals, sizes = text.rpartition("=")
    if not equals:
        raise click.UsageError(f"--shape {text}: expected an input's name and =1x3x224x224")
    return name, _sizes("shape", sizes)


# So many rows of a run are shown; of more, the worst and how many there are.
_ROWS = 8


def _measurements(run):
    """The rows of a run's table."""
    yield "OUTPUT", "MAX ABS", "MAX REL", "ULP", "COSINE", "TOP-1"
    outputs = run.outputs
    if len(outputs) > _ROWS:
        worst = min(outputs, key=lambda o: (o.ok, -o.max_rel))
        outputs = [replace(worst, name=f"{worst.name}, the worst of {len(outputs)}")]
    for o in outputs:
        numbers = o.max_abs, o.max_rel, o.ulp, o.cosine, o.top1
        cells = zip(("{:.1e}", "{:.1e}", "{:.1f}", "{:.9f}", "{:.1%}"), numbers, strict=True)
        yield o.name, *("" if value is None else form.format(value) for form, value in cells)


@cli.command()
@click.argument("model", metavar="PKG:FACTORY")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE",
    help="Shape of a float32 input, like 1x3x224x224, or batchx3x224x224 for any batch; once for "
    "each, in order.",
)
@click.option("--beta", type=float, help="Curvature in [0, 1] of all activations.")
@click.option(
    "--coeff", type=float, default=0.5, show_default=True, help="The paper's c, in [0, 1]."
)
@click.option("--checkpoint", metavar="FILE", help="State dict of the T-CT model: .pth.")
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="Where to write; - for standard output."
)
@_force
@_json
def export(model, inputs, output, as_json, **choices):
    """Export a PyTorch model as a steered ONNX model.

    FACTORY is a function without arguments, in a package or module that can be imported from the
    current folder, and gives the nn.Module. A .pt2 file of torch.export.save can take its place.
    """
    shapes = [_sizes("input", text, names=True) for text in inputs]
    from ..torch import by_name

    report, written = by_name.export_model(model, shapes, output, **choices)
    _say_of(report, as_json)
    if as_json:
        replaced = [_as_json(a, "module") for a in report.replaced]
        skipped = [_as_json(a, "reason") for a in report.skipped]
        _print_json(written, replaced=replaced, skipped=skipped, notes=report.notes)
    else:
        _echo(written, f"wrote {written}: {_counts(report)}")


@cli.command()
@_json
def doctor(as_json):
    """Tell what is installed, and whether the op library works."""
    from ..doctor import examine

    report = examine()
    if as_json:
        _print_json(**report)
    else:
        for name, version in report["packages"].items():
            click.echo(f"{name:20} {version or 'not installed'}")
        click.echo(f"{'providers':20} {', '.join(report['providers']) or 'none'}")
        click.echo(f"{'op library':20} {report['library'] or 'not installed'}")
        click.echo(f"{'CPU kernels':20} {report['cpu_level'] or 'none'}")
        click.echo(f"{'CUDA kernels':20} {report['cuda_kernels'] or 'none'}")
        click.echo(f"{'CUDA':20} {report['cuda']}")
        for problem in report["problems"]:
            _say(f"problem: {problem}")
        click.echo("works" if report["ok"] else "the op library does not work, see above")
    if not report["ok"]:
        sys.exit(4)


@cli.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8710, show_default=True, help="0 for any."
)
def playground(port):
    """Serve a page with sliders for beta and c to a browser on this machine.

    It shows a decision boundary, a regression curve and a reader of digits, run by onnxruntime-web,
    which npm fetches at the first start. Ctrl-C ends it.
    """
    from ..playground import server

    with server(port, _say) as serving:
        host, port = serving.server_address
        click.echo(f"http://{host}:{port}/")
        _say("open this in a browser; Ctrl-C ends the playground")
        with suppress(KeyboardInterrupt):
            serving.serve_forever()


def _say_of(report, as_json):
    """Say what a rewrite.Report has besides what was asked; the document lists what was skipped."""
    for note in report.notes:
        _say(note)
    for a in () if as_json else report.skipped:
        _say(f"skipped {a.path}: {a.reason}")


def _counts(report):
    return f"{len(report.replaced)} steered, {len(report.skipped)} skipped"


def _as_json(activation, *more):
    return {field: getattr(activation, field) for field in ("name", "op", "scope", *more)}


def _print_json(output=None, **document):
    """Print a document, with `output` in it where there is one."""
    if output is not None:
        document = {"output": str(output), **document}
    _echo(output, json.dumps({"schema_version": 1, **document}, indent=2))


def _echo(output, text):
    """Print a result; to stderr where stdout holds the model."""
    click.echo(text, err=output == "-")


def _progress(label="copying data", rated=False):
    """What draws a bar on stderr while something is done; None where that is no terminal.

    The total may be None, where it is not known. `rated` shows how many were done, and the rate.
    """
    if not sys.stderr.isatty():
        return None

    def bar(total):
        start = time.monotonic()

        def rate(_):
            return f"{made.pos / (time.monotonic() - start):.3g} runs/s"

        shown = {"show_pos": True, "item_show_func": rate} if rated else {}
        endless = None if total is not None else itertools.repeat(None)
        made = click.progressbar(endless, length=total, label=label, file=sys.stderr, **shown)
        return made

    return bar


def _say(message):
    """Messages go to stderr: stdout holds the result only."""
    click.echo(message, err=True)


def main():
    """Run the command line; a user's mistake is one line on stderr and its exit code."""
    # As on Ctrl-C, nothing half-done is left behind.
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        # Not standalone, for click would print its usage errors over several lines.
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        _say(f"ctonnx: {error.format_message()}")
        code = error.exit_code
    except CtonnxError as error:
        _say(f"ctonnx: {error}")
        code = error.exit_code
    except OSError as error:
        _say(f"ctonnx: {error.filename or 'standard output'}: {error.strerror}")
        code = 1
    except (click.Abort, KeyboardInterrupt):
        # A second one would end Python in the middle of its own end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say("ctonnx: interrupted")
        code = _INTERRUPTED
    sys.exit(code)
