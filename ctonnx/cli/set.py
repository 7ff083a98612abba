"""`ctonnx set`."""

import click

from . import options
from .output import echo, print_json, progress, say


@click.command("set")
@options.model
@click.option("--beta", type=float, required=True, help="The new beta, in [0, 1].")
@options.output
@options.force
@options.json
def set_(model, beta, output, force, as_json):
    """Change the beta of a steered MODEL.

    MODEL is a file, or - for standard input. --output defaults to MODEL itself.
    """
    from ..model import files
    from ..rewriting.steered import SteeredModel

    path = model if output is None else output
    with files.Transaction(model, path, force or output is None, progress()) as edit:
        steered = SteeredModel(edit.model)
        count = steered.set(beta)
    if steered.renamed:
        say(f"the CTUs have their name back, in place of {', '.join(sorted(steered.renamed))}")
    if count > 1:
        say(f"all activations have it now, in place of {count} betas")
    if as_json:
        print_json(edit.output, beta=beta)
    else:
        echo(edit.output, f"wrote {edit.output}: beta {beta:.12g}")
