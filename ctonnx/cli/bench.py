"""`ctonnx bench`."""

from dataclasses import asdict

import click

from . import options
from .output import echo, print_json, say
from .tables import columns


def _counts(context, option, value):
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers") from None


@click.command()
@options.model
@click.option("--beta", type=float, help="For a model that is not steered yet.  [default: 0.85]")
@click.option("--coeff", type=float, help="The c that goes with it.  [default: 0.5]")
@options.shapes
@click.option(
    "--threads",
    metavar="N[,N...]",
    callback=_counts,
    default="1",
    show_default=True,
    help="Numbers of threads, each in turn.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=31, show_default=True, help="Runs of each variant."
)
@options.json
def bench(model, shapes, as_json, **choices):
    """Time what steering MODEL costs on the CPU.

    The original and the steered model run in turns on a random input: as `ctonnx.session` runs it,
    in the plain layout, without the op library, and with the formula in naive standard ops. MODEL
    may be steered, and is timed against its original then. First it is verified that the steered
    ways to run the model agree. The figures are medians; RATIO is that of the time of a run to the
    original's, and OPEN the time to open a session.
    """
    from ..measure.bench import bench

    result = bench(model, shapes=shapes, **choices)
    for note in result.notes:
        say(note)
    if as_json:
        timings = [asdict(timing) for timing in result.timings]
        print_json(inputs=result.inputs, timings=timings, notes=result.notes)
        return
    shapes = (f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in result.inputs.items())
    echo(None, f"outputs agree, on {', '.join(shapes)}")
    rows = [("THREADS", "VARIANT", "RUN", "RATIO", "OPEN")]
    for t in result.timings:
        run, opening = f"{t.run_ms:.4g} ms", f"{t.open_ms:.0f} ms"
        rows.append((str(t.threads), t.variant, run, f"x{t.ratio:.2f}", opening))
    for line in columns(rows):
        click.echo(line)
