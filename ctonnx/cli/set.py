"""`ctonnx set`."""

import click

from . import options
from .output import echo, print_json, progress, say


@click.command("set")
@options.model
@click.option("--beta", type=float, required=True, help="The new beta, in [0, 1].")
@click.option("--coeff", type=float, help="The paper's c, in [0, 1].  [default: as it is]")
@options.output
@options.fed_by_calibration
@options.force
@options.json
def set_(model, beta, coeff, output, force, as_json, calibration):
    """Change the beta of a steered MODEL.

    MODEL is a file, or - for standard input. --output defaults to MODEL itself. A calibrated MODEL
    needs --calibrate again, which restores the statistics that it has on DATA.
    """
    from ..calibration.calibrate import set_calibrated
    from ..model import files
    from ..rewriting.steered import SteeredModel

    path = model if output is None else output
    options.check_outputs({"--output": path}, {"--calibrate": options.data_of(calibration)})
    with files.Transaction(model, path, force or output is None, progress()) as edit:
        steered = SteeredModel(edit.model)
        count, notes = set_calibrated(
            steered, calibration, edit.origin, beta, coeff, progress("calibrating")
        )
    for note in notes:
        say(note)
    if steered.renamed:
        say(f"the CTUs have their name back, in place of {', '.join(sorted(steered.renamed))}")
    if count > 1:
        say(f"all activations have it now, in place of {count} betas")
    if as_json:
        print_json(edit.output, beta=beta)
    else:
        echo(edit.output, f"wrote {edit.output}: beta {beta:.12g}")
