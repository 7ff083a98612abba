"""`ctonnx export`."""

import click

from . import options
from .output import as_json as fields_of
from .output import counts, echo, print_json, say_report


@click.command()
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
@options.force
@options.json
def export(model, inputs, output, as_json, **choices):
    """Export a PyTorch model as a steered ONNX model.

    FACTORY is a function without arguments, in a package or module that can be imported from the
    current folder, and gives the nn.Module. A .pt2 file of torch.export.save can take its place.
    """
    shapes = [options.sizes("input", text, symbols=True) for text in inputs]
    from ..torch import by_name

    report, path = by_name.export_model(model, shapes, output, **choices)
    say_report(report, as_json)
    if as_json:
        replaced = [fields_of(a, "module") for a in report.replaced]
        skipped = [fields_of(a, "reason") for a in report.skipped]
        print_json(path, replaced=replaced, skipped=skipped, notes=report.notes)
    else:
        echo(path, f"wrote {path}: {counts(report)}")
