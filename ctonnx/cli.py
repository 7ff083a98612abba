"""The command line: parse, call, print. Only this file knows click."""

import json
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict, replace

import click

from .errors import CheckFailed, CtonnxError

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="ctonnx")
@click.pass_context
def cli(context):
    """Steer ONNX models by one number: Curvature Tuning (arXiv 2502.07783) without training."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# As typed, for a Path would drop the slash that ends a folder's name, and take `./-` for `-`.
# Whether it can be read is for the code that reads it to say.
_model = click.argument("model")
_output = click.option("-o", "--output", help="Where to write; - for standard output.")
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
    "--ops", metavar="LIST", help="Op types to steer: relu,leakyrelu,prelu,clip,... [default: all]"
)
@click.option("--include", metavar="REGEX", help="Steer only nodes whose name matches.")
@click.option("--exclude", metavar="REGEX", help="Leave out nodes whose name matches.")
@click.option(
    "--params",
    "params_file",
    metavar="FILE",
    help="Beta and coeff by node name or regular expression, per channel too: .json or .npz; or of "
    "a T-CT state dict: .pth.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Before writing, compare with the original at beta 1, and kernel with fallback.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@_force
@_json
def patch(model, beta, coeff, params_file, output, ops, check, dry_run, force, as_json, **choices):
    """Steer MODEL, a file or - for standard input.

    Writes X.ct.onnx beside X.onnx, - for -, or OUTPUT.
    """
    from . import api, files, params, rewrite, runtime, validate

    if beta is None and params_file is None:
        raise click.UsageError("Missing option '--beta', or '--params'")
    given = None if params_file is None else params.load(params_file)

    def steer(proto):
        names = None if ops is None else [name.strip() for name in ops.split(",")]
        return rewrite.steer(proto, beta, coeff, params=given, ops=names, **choices)

    def verify(report, path):
        checks.update(validate.check_steered(model, path, report, beta, choices["lowering"]))

    checks = {}
    if dry_run and check:
        raise click.UsageError("--check runs what is written: it does not go with --dry-run")
    report, output = files.edit(
        model,
        steer,
        api.steered_path if output is None else output,
        force,
        verify if check else None,
        _progress(),
        write=not dry_run,
    )
    if choices["lowering"] == "portable" and not runtime.has_library():
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
                {"check": name, **asdict(comparison)}
                for name, comparisons in checks.items()
                for comparison in comparisons
            ],
        )
        return
    for name, comparisons in checks.items():
        worst = max(c.max_rel for c in comparisons)
        _say(f"check passed: {name}, largest relative difference {worst:.1e}")
    at = f"{beta:.12g}" if given is None else "per activation"
    done = "would write" if dry_run else "wrote"
    _echo(output, f"{done} {output}: {_counts(report)} at beta {at}")


@cli.command()
@_model
@_json
def inspect(model, as_json):
    """List the activations of MODEL, a file or - for standard input, and their state."""
    from . import api

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


_COLORS = {"steered": "green", "steerable": "cyan", "skipped": "yellow"}


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
    """Change the beta of a steered MODEL, in place or into OUTPUT; - is standard input."""
    from . import files, rewrite

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
    """Give back the original of a steered MODEL, a file or - for standard input.

    Writes X.onnx for X.ct.onnx, - for -, or OUTPUT.
    """
    from . import api, files, rewrite

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
        _echo(written, f"wrote {written}: the original")


@cli.command()
@_model
@click.option(
    "--against",
    metavar="ORIGINAL",
    help="Compare with this unsteered model, at beta 1. [default: with a float64 run]",
)
@click.option(
    "--torch",
    "module",
    metavar="PKG:FACTORY",
    help="Compare with this PyTorch model, as for `ctonnx export`, steered alike.",
)
@click.option("--inputs", metavar="FILE", help="An .npz file of inputs. [default: random ones]")
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
    default="CPUExecutionProvider",
    show_default=True,
    help="ONNX Runtime's execution providers, each in turn.",
)
@click.option(
    "--rtol",
    type=float,
    help="Allowed difference, of an output's largest value. [default: 1e-4 for float32]",
)
@click.option("--atol", type=float, help="Allowed difference besides. [default: 1e-6]")
@_json
def validate(model, shapes, providers, as_json, **options):
    """Compare what MODEL gives in ONNX Runtime with what the method says."""
    from .validate import validate

    result = validate(
        model,
        shapes=dict(map(_named_sizes, shapes)),
        providers=[name.strip() for name in providers.split(",")],
        **options,
    )
    for note in result.notes:
        _say(note)
    if as_json:
        _print_json(
            ok=result.ok,
            against=result.against,
            outputs=[
                {"run": run.name, **_finite(asdict(output))}
                for run in result.runs
                for output in run.outputs
            ],
            diverges={run.name: run.diverges for run in result.runs if run.diverges},
            notes=result.notes,
        )
    else:
        click.echo(f"compared with {result.against}")
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


def _sizes(option, text):
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise click.UsageError(f"--{option} {text}: expected sizes like 1x3x224x224")
    return [int(size) for size in sizes]


def _named_sizes(text):
    """The name and the sizes in `image=1x3x224x224`."""
    name, equals, sizes = text.rpartition("=")
    if not equals:
        raise click.UsageError(f"--shape {text}: expected an input's name and =1x3x224x224")
    return name, _sizes("shape", sizes)


# So many rows of a run are shown; of more, the worst and how many there are.
_ROWS = 8


def _finite(fields):
    """A dict with None for the numbers that JSON has no way to write."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }


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
    help="Shape of an input, like 1x3x224x224; once for each, in order.",
)
@click.option("--beta", type=float, help="Curvature in [0, 1] of all activations.")
@click.option(
    "--coeff", type=float, default=0.5, show_default=True, help="The paper's c, in [0, 1]."
)
@click.option("--checkpoint", metavar="FILE", help="State dict of the T-CT model: .pth.")
@click.option("-o", "--output", required=True, help="Where to write; - for standard output.")
@_force
@_json
def export(model, inputs, output, as_json, **choices):
    """Export a PyTorch model as a steered ONNX model.

    FACTORY is a function without arguments, in a package or module that can be imported from the
    current folder, and gives the nn.Module. A .pt2 file of torch.export.save can take its place.
    """
    shapes = [_sizes("input", text) for text in inputs]
    from . import factory

    report, written = factory.export(model, shapes, output, **choices)
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
    from .doctor import examine

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


def _progress():
    """What draws a bar on stderr while data are copied; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda total: click.progressbar(length=total, label="copying data", file=sys.stderr)


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
        _say("ctonnx: interrupted")
        code = _INTERRUPTED
    sys.exit(code)
