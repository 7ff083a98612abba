"""`ctonnx unpatch`."""

import click

from . import options
from .output import echo, print_json, progress


@click.command()
@options.model
@options.output
@options.force
@options.json
def unpatch(model, output, force, as_json):
    """Give back the original of a steered MODEL.

    What other tools did to MODEL since it was steered stays. MODEL is a file, or - for standard
    input. --output defaults to X.onnx beside X.ct.onnx, and to standard output for -.
    """
    from .. import api
    from ..model import files
    from ..rewriting.steered import SteeredModel

    path = api.original_path if output is None else output
    with files.Transaction(model, path, force, progress()) as edit:
        SteeredModel(edit.model).unsteer()
    if as_json:
        print_json(edit.output)
    else:
        echo(edit.output, f"wrote {edit.output}: unsteered")
