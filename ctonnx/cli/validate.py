"""`ctonnx validate`."""

import sys
from dataclasses import asdict, replace

import click

from ..errors import CheckFailed
from . import options
from .output import echo, print_json, say
from .tables import columns

# Most rows of a run that are shown; a longer run shows its worst output and their number.
_ROWS = 8


@click.command()
@options.model
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
@options.shapes
@click.option(
    "--providers",
    metavar="LIST",
    callback=options.names,
    default="CPUExecutionProvider",
    show_default=True,
    help="ONNX Runtime's execution providers, each in turn.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(0),
    help="Allowed difference, as a part of the largest value of an output and of each of its "
    "channels.  [default: 1e-5, or 1e-4 from a float64 run; up to 1e-3 where the output is that "
    "sensitive; 1e-2 where float16 is computed in, 5e-2 for bfloat16]",
)
@click.option("--atol", type=click.FloatRange(0), help="Allowed difference besides.  [default: 0]")
@options.json
def validate(model, shapes, as_json, **choices):
    """Show that MODEL computes what the method says.

    Each output that it gives in ONNX Runtime is compared with that of a float64 run, or of another
    model: with the op library, without it, and in the blocked layout where `ctonnx.session` uses
    that. Beside a float64 run, its CT units are also tried by themselves, on inputs of their own.
    MAX REL is the largest difference over the largest value, ULP the largest difference in units of
    the last place. An output that hardly responds to the inputs is INCONCLUSIVE, and no pass.
    """
    from ..check.validate import validate

    result = validate(model, shapes=shapes, **choices)
    for note in result.notes:
        say(note)
    if as_json:
        _print_json(result)
    else:
        _print(result)
    for run in result.runs:
        for output in run.outputs:
            if not output.ok:
                say(f"{run.name}: {output.name!r} {output.reason}")
        if run.diverges:
            say(f"{run.name}: the first activation to differ is {run.diverges}")
    if any(run.inconclusive for run in result.runs):
        say("inconclusive: give --inputs that the outputs respond to, or with --shape another size")
    if not result.ok:
        sys.exit(CheckFailed.exit_code)


def _print_json(result):
    from ..measure.results import without_nan

    print_json(
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


def _print(result):
    shapes = (f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in result.inputs.items())
    echo(None, f"compared with {result.against}, on {', '.join(shapes)}")
    for run in result.runs:
        verdict = "passed" if run.ok else "INCONCLUSIVE" if run.inconclusive else "FAILED"
        echo(None, f"{run.name}: {verdict}")
        for line in columns(_rows(run)):
            click.echo(f"  {line}")


def _rows(run):
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
