"""`ctonnx tune`."""

import warnings
from pathlib import Path

import click

from . import options
from .output import echo, print_json, progress, say
from .tables import columns, interval


@click.command()
@options.model
@click.option("--train", metavar="DATA", required=True, help="To train on.")
@click.option("--val", metavar="DATA", help="To stop training by, and to measure on.")
@options.labels
@click.option("--val-labels", metavar="NAME", help="The same for --val.  [default: as --labels]")
@click.option(
    "--per",
    type=click.Choice(["channel", "activation", "stage", "model"]),
    default="channel",
    show_default=True,
    help="What has a beta and a c of its own; a stage is what has one resolution.",
)
@click.option(
    "--groups",
    metavar="REGEX,...",
    callback=options.names,
    help="Share a beta and a c among the activations whose path or module each matches first.",
)
@click.option("--beta", type=float, help="Where beta starts.  [default: 0.8]")
@click.option("--coeff", type=float, help="Where the paper's c starts.  [default: 0.5]")
@click.option(
    "--init", metavar="FILE", help="Where single activations start: as --params of patch."
)
@click.option("--by-order", is_flag=True, help="Assign the pairs of a state dict in order.")
@click.option(
    "--loss",
    metavar="NAME|PKG:FUNCTION",
    default="cross-entropy",
    show_default=True,
    help="cross-entropy, mse, or a function of yours: outputs by name and labels to a tensor.",
)
@click.option(
    "--metric",
    metavar="NAME|PKG:FUNCTION",
    help="What is reported, as for sweep.  [default: accuracy; mse for the loss mse]",
)
@click.option("--head", is_flag=True, help="Train a new linear layer for the data's labels too.")
@click.option(
    "--features",
    metavar="TENSOR",
    help="What the new head reads.  [default: the input of the last linear layer]",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["frozen", "adapt"]),
    default="frozen",
    show_default=True,
    help="Keep the statistics of batch norm, or adapt them as PyTorch does in training.",
)
@click.option("--epochs", type=int, default=20, show_default=True, help="Passes over --train.")
@click.option(
    "--patience",
    type=int,
    default=5,
    show_default=True,
    help="Epochs without a smaller loss on --val that end the training.",
)
@click.option(
    "--rate", type=float, default=0.1, show_default=True, help="Adam's rate for beta and c."
)
@click.option(
    "--head-rate", type=float, default=1e-3, show_default=True, help="Adam's rate for the head."
)
@click.option("--micro-batch", type=int, help="Samples to run at once.  [default: the batch]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of order and head.")
@click.option("--device", help="Where PyTorch trains.  [default: cuda where there is one]")
@click.option("--include", metavar="REGEX", help="Train only nodes whose name matches.")
@click.option("--exclude", metavar="REGEX", help="Leave out nodes whose name matches.")
@click.option(
    "--output-name", metavar="NAME", help="The output to train on.  [default: as for sweep]"
)
@options.feeding
@click.option("-o", "--output", metavar="FILE", help="Where to write the model.")
@click.option(
    "--export-checkpoint",
    metavar="FILE.pth",
    help="Write the raw beta and c too, under the names of the authors' code.",
)
@click.option("--resume", is_flag=True, help="Continue the interrupted training of this --output.")
@options.force
@options.json
def tune(model, output, as_json, feeding, **choices):
    """Train beta and c of MODEL on your data.

    Beta and c are sigmoids of what Adam trains; the weights stay. With --head, or --batch-norm
    adapt, a network without beta and c is trained likewise, and the gain is over that. --output,
    which defaults to X.ct.onnx beside X.onnx, is a steered model like any other.

    DATA is as for sweep.
    """
    from .. import api
    from ..model import files
    from ..ort import library

    if files.STDIO in (model, output):
        raise click.UsageError("tune takes the model's file, and writes one, not -")
    output = Path(api.steered_path(model) if output is None else output)
    inputs = {"MODEL": model, "--train": choices["train"], "--val": choices["val"]}
    outputs = {"--output": output, "--export-checkpoint": choices["export_checkpoint"]}
    options.check_outputs(outputs, {k: v for k, v in inputs.items() if v is not None})
    if not library.has_library():
        say("the op library is not installed: the model runs as its fallback")
    from ..tuning import tuning

    saved = Path(f"{output}.progress")
    before = saved.stat().st_mtime_ns if saved.exists() else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "running without fast kernels")
            bar = progress("tuning", described=True)
            result = tuning.tune(model, output=output, progress=bar, **feeding, **choices)
    except BaseException:
        if saved.exists() and saved.stat().st_mtime_ns != before:
            say(f"progress saved in {saved}; continue with --resume")
        raise
    for note in result.notes:
        say(note)
    if as_json:
        print_json(output, **result.document())
        return
    _print(result, output)
    if choices["export_checkpoint"] is not None:
        say(f"wrote {choices['export_checkpoint']}")


def _print(result, output):
    for line in (*columns(_epoch_rows(result)), *columns(_group_rows(result))):
        click.echo(line)
    form = ".4f" if 0.01 <= abs(result.written) < 1e5 or not result.written else ".3e"
    control = "without beta and c" if result.controlled else "the original"
    gain, ends = interval(result, form)
    if result.controlled and result.original is not None:
        echo(None, f"the original: {result.metric} {result.original:{form}}")
    echo(
        None,
        f"{result.metric} {result.written:{form}} on {result.samples} samples, {control} "
        f"{result.reference:{form}}: gain {gain} (95 %: {ends})",
    )
    echo(None, f"wrote {output}: {result.parameters} numbers of beta and c trained")


def _epoch_rows(result):
    """The rows of a table with one for each epoch."""
    yield "", "EPOCH", "LOSS", "VALIDATION LOSS", result.metric.upper()
    for e in result.epochs:
        numbers = (e.validation_loss, e.metric)
        shown = ("" if number is None else f"{number:.4g}" for number in numbers)
        yield "*" if e is result.best else "", str(e.epoch), f"{e.loss:.4g}", *shown


def _group_rows(result):
    """The rows of a table with one for each group of activations."""
    yield "GROUP", "ACTIVATIONS", "BETA", "±", "C", "±"
    groups = {}
    for activation in result.activations:
        groups.setdefault(activation.group, []).append(activation)
    for name, members in groups.items():
        a = members[0]
        spread = a.values > 1
        yield (
            name,
            str(len(members)),
            f"{a.beta:.3f}",
            f"{a.beta_deviation:.3f}" if spread else "",
            f"{a.coeff:.3f}",
            f"{a.coeff_deviation:.3f}" if spread else "",
        )
