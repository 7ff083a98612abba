"""`ctonnx patch`."""

import math
from dataclasses import asdict
from os.path import realpath

import click

from . import options
from .output import as_json as fields_of
from .output import counts, echo, print_json, progress, say, say_report


@click.command()
@options.model
@click.option("--beta", type=float, help="Curvature in [0, 1]; 1 is the original.")
@click.option(
    "--coeff", type=float, default=0.5, show_default=True, help="The paper's c, in [0, 1]."
)
@options.output
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
    "--ops",
    metavar="LIST",
    callback=options.names,
    help="Op types to steer.  [default: relu, leakyrelu, prelu, clip, hardsigmoid, max, min]",
)
@click.option("--include", metavar="REGEX", help="Steer only nodes whose name matches.")
@click.option("--exclude", metavar="REGEX", help="Leave out nodes whose name matches.")
@click.option(
    "--params",
    "params_file",
    metavar="FILE",
    help="Beta and c of single activations, per channel too, by name or regular expression: .json "
    "or .npz; or a T-CT state dict: .pth.",
)
@click.option(
    "--by-order",
    is_flag=True,
    help="Assign the pairs of a state dict in order, where modules have other names or none.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Before writing, compare it with the original at beta 1, and kernel with fallback.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@options.fed_by_calibration
@options.force
@options.json
def patch(model, output, params_file, by_order, dry_run, as_json, **choices):
    """Steer MODEL: write a copy with CT units for activations.

    MODEL is a file, or - for standard input. --output defaults to X.ct.onnx beside X.onnx, and to
    standard output for -.
    """
    from ..ort import library
    from ..rewriting import params

    if choices["beta"] is None and params_file is None:
        raise click.UsageError("Missing option '--beta', or '--params'")
    if by_order and params_file is None:
        raise click.UsageError("--by-order goes with --params")
    params_given = None if params_file is None else params.read(params_file, by_order)
    if dry_run and choices["check"]:
        raise click.UsageError("--check runs what is written: it does not go with --dry-run")
    options.check_outputs(
        {"--output": output}, {"--calibrate": options.data_of(choices["calibration"])}
    )
    over_itself = output not in (None, "-") and realpath(output) == realpath(model)
    if over_itself and choices["lowering"] == "primitives":
        raise click.UsageError("primitives cannot be undone: write to another file than MODEL")
    report, checks, output = _steer(model, output, params_given, dry_run, **choices)
    if choices["lowering"] == "portable" and not library.has_library():
        report.notes.append("the op library is not installed: here the model runs as its fallback")
    say_report(report, as_json)
    if as_json:
        _print_json(report, checks, output, dry_run)
        return
    for name, comparisons in checks.items():
        kind, worst = "relative", max(c.max_rel for c in comparisons)
        if not math.isfinite(worst):  # Every expected output is 0.
            kind, worst = "absolute", max(c.max_abs for c in comparisons)
        say(f"check passed: {name}, largest {kind} difference {worst:.1e}")
    at = f"{choices['beta']:.12g}" if params_given is None else "per activation"
    done = "would write" if dry_run else "wrote"
    echo(output, f"{done} {output}: {counts(report)} at beta {at}")


def _steer(model, output, params, dry_run, **choices):
    """Steer a model and write it; gives the Report, the comparisons of --check and the output."""
    from .. import api
    from ..calibration.calibrate import check_calibration, steer_calibrated
    from ..check import validate
    from ..model import files
    from ..rewriting.steer import Selection

    beta, lowering, force = choices["beta"], choices["lowering"], choices["force"]
    calibration = choices["calibration"]
    if calibration is not None:
        check_calibration(calibration, choices["beta_as"])
    path = api.steered_path if output is None else output
    checks = {}

    def check(report):
        if choices["check"]:
            checks.update(validate.check_steered(model, edit.stage(), report, beta, lowering))

    with files.Transaction(model, path, force or dry_run, progress(), dry_run) as edit:
        report = steer_calibrated(
            edit.model,
            calibration,
            files.Origin() if calibration is None else edit.origin(),
            check,
            progress("calibrating"),
            beta=beta,
            coeff=choices["coeff"],
            params=params,
            beta_as=choices["beta_as"],
            lowering=lowering,
            selection=Selection(choices["ops"], choices["include"], choices["exclude"]),
        )
        if checks and calibration is not None:
            edit.stage()
    return report, checks, edit.output


def _print_json(report, checks, output, dry_run):
    from ..measure.results import without_nan

    print_json(
        output,
        written=not dry_run,
        replaced=[fields_of(a) for a in report.replaced],
        skipped=[fields_of(a, "reason") for a in report.skipped],
        notes=report.notes,
        checks=[
            {"check": name, **without_nan(asdict(comparison))}
            for name, comparisons in checks.items()
            for comparison in comparisons
        ],
    )
