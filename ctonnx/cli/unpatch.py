"""`ctonnx unpatch`."""

import click

from . import options
from .output import echo, print_json, progress


@click.command()
@options.model
@options.output
@click.option(
    "--original",
    metavar="FILE",
    help="The original of a calibrated MODEL, whose weights have changed: it gives back its bytes.",
)
@options.force
@options.json
def unpatch(model, output, original, force, as_json):
    """Give back the original of a steered MODEL.

    What other tools did to MODEL since it was steered stays. MODEL is a file, or - for standard
    input. --output defaults to X.onnx beside X.ct.onnx, and to standard output for -.
    """
    from .. import api
    from ..model import files
    from ..rewriting.steered import SteeredModel

    if original is not None:
        written = api.unpatch(model, output, original=original, force=force)
    else:
        path = api.original_path if output is None else output
        with files.Transaction(model, path, force, progress()) as edit:
            SteeredModel(edit.model).unsteer()
        written = edit.output
    if as_json:
        print_json(written)
    else:
        echo(written, f"wrote {written}: unsteered")
