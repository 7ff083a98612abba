"""`ctonnx probe`."""

import warnings
from pathlib import Path

import click

from . import options
from .output import echo, print_json, progress, say
from .tables import columns, interval, mark


@click.command()
@options.model
@click.option("--train", metavar="DATA", required=True, help="To fit on and to choose beta on.")
@click.option("--test", metavar="DATA", required=True, help="To measure on alone.")
@options.labels
@click.option("--test-labels", metavar="NAME", help="The same for --test.  [default: as --labels]")
@options.betas
@click.option("--coeff", type=float, help="The paper's c.  [default: the model's own, or 0.5]")
@click.option(
    "--features",
    metavar="TENSOR",
    help="What to fit on.  [default: the input of the last linear layer]",
)
@click.option(
    "--output-name",
    metavar="NAME",
    help="The output of the new head.  [default: the first that has a linear layer]",
)
@click.option("--seeds", type=int, default=3, show_default=True, help="Splits to choose beta on.")
@click.option(
    "--validation", type=float, default=0.2, show_default=True, help="Share of --train for that."
)
@options.feeding
@options.calibrating
@options.providers
@click.option("-o", "--output", metavar="FILE", help="Where to write the model.")
@click.option("--points", metavar="FILE", help="Write the points: .csv, .json or .parquet.")
@options.force
@options.json
def probe(model, output, points, as_json, feeding, **choices):
    """Give MODEL other classes: a new linear head, and the beta that serves it.

    At each beta a linear head is fitted on the features in front of the classifier. Beta is chosen
    on a part of the training set, and the test set compares it with beta 1, plain linear probing.
    --output, which defaults to X.probe.onnx beside X.onnx, gets the model with that beta and head.

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
        files.check_output(points, choices["force"])
    inputs = {"MODEL": model, "--train": choices["train"], "--test": choices["test"]}
    inputs["--calibrate"] = options.data_of(choices["calibration"])
    options.check_outputs({"--output": output, "--points": points}, inputs)
    if not library.has_library():
        say("the op library is not installed: the model runs as its fallback")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "running without fast kernels")
        result = probing.probe(
            model, output=output, progress=progress("probing"), **feeding, **choices
        )
    if points is not None:
        result.write(points)
        say(f"wrote {points}")
    for note in result.notes:
        say(note)
    if as_json:
        print_json(output, **result.document())
        return
    _print(result, output)


def _print(result, output):
    echo(
        None,
        f"{result.width} features {result.features!r}, {len(result.classes)} classes, "
        f"{result.train_samples} training and {result.test_samples} test samples",
    )
    for line in (*columns(_rows(result)), *columns(_seed_rows(result))):
        click.echo(line)
    gain, ends = interval(result, ".4f")
    echo(
        None,
        f"accuracy {result.accuracy:.4f}, linear probing {result.original.test:.4f}: gain "
        f"{gain} (95 %: {ends})",
    )
    echo(None, f"wrote {output}: beta {result.best.beta:g}, test accuracy {result.written:.4f}")


def _rows(result):
    """The rows of a table with one for each point."""
    yield "", "BETA", "VALIDATION", "TEST", "GAIN", "95 %"
    for p in result.points:
        gain = ("", "") if p is result.original else interval(p, ".4f")
        yield mark(p, result), f"{p.beta:g}", f"{p.validation:.4f}", f"{p.test:.4f}", *gain


def _seed_rows(result):
    """The rows of a table of what each seed chose."""
    yield "SEED", "BETA", "VALIDATION", "TEST", "GAIN"
    for s in result.seeds:
        numbers = (f"{s.validation:.4f}", f"{s.test:.4f}", f"{s.gain:+.4f}")
        yield str(s.seed), f"{s.beta:g}", *numbers
