"""`ctonnx inspect`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import click

from . import options
from .output import as_json as fields_of
from .output import echo, print_json, say
from .tables import columns

# Of a histogram: empty first, then the higher the more.
_BARS = "_▁▂▃▄▅▆▇█"


@click.command()
@options.model
@click.option(
    "--plot",
    "drawing",
    metavar="FILE",
    help="Draw beta and c of all channels against depth, into a .png or .svg file.",
)
@options.force
@options.json
def inspect(model, drawing, force, as_json):
    """List the activations of MODEL, and their state.

    MODEL is a file, or - for standard input. An activation is steered, steerable or, with the
    reason, skipped. Where channels differ, mean and standard deviation are shown, and a histogram
    from 0 to 1.
    """
    from ..measure import depth
    from ..model import files
    from ..rewriting.steered import SteeredModel

    if drawing is not None:
        depth.check_drawing(drawing)
        files.check_output(drawing, force)
    steered = SteeredModel(files.load(model))
    activations = steered.activations
    if steered.renamed:
        say(
            f"another tool renamed CTUs to {', '.join(sorted(steered.renamed))}, for which ONNX "
            "Runtime has no kernel: `ctonnx set` gives them their name back"
        )
    if drawing is not None:
        depth.draw(activations, drawing)
        say(f"wrote {drawing}")
    if as_json:
        fields = ("status", "reason", "beta", "coeff", "shape", "module")
        print_json(
            activations=[fields_of(a, *fields) for a in activations],
            calibration=steered.metadata.calibration,
        )
        return
    for line in columns(rows(activations)):
        click.echo(line)
    states = Counter(a.status for a in activations)
    names = ("steered", "steerable", "skipped")
    echo(None, ", ".join(f"{states[name]} {name}" for name in names))
    record = steered.metadata.calibration
    if record is not None:
        numbers = (record.get(name, "?") for name in ("layers", "samples", "data"))
        echo(None, "calibrated: {} layers on {} samples of digest {}".format(*numbers))


def rows(activations: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a table with one for each activation."""
    if activations:
        yield "STATE", "OP", "SHAPE", "NAME", "MODULE", "SCOPE", ""
    for a in activations:
        shape = "" if a.shape is None else ",".join("?" if d is None else str(d) for d in a.shape)
        yield a.status, a.op, shape, a.name, a.module or "", a.scope, _detail(a)


def _detail(activation):
    if activation.status == "skipped":
        return activation.reason
    if activation.status == "steerable":
        return ""
    coeff = "" if activation.coeff in (None, 0.5) else f", c {_number(activation.coeff)}"
    return f"beta {_number(activation.beta)}{coeff}"


def _number(value):
    if not isinstance(value, list):
        return "fed" if value is None else format(value, ".12g")
    import numpy as np

    numbers = np.ravel(value)
    return f"per channel {numbers.mean():.3f} ± {numbers.std():.3f} {_histogram(numbers)}"


def _histogram(numbers):
    """How numbers in [0, 1] are distributed over ten bins, a character each."""
    import numpy as np

    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)
