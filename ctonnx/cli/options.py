"""Arguments and options that several commands have."""

from collections.abc import Callable
from functools import wraps
from os.path import realpath
from typing import Any

import click
from click.core import ParameterSource


def names(context: click.Context, option: click.Parameter, value: str | None) -> list | None:
    """A list of names from text with commas."""
    return None if value is None else [name.strip() for name in value.split(",")]


def _numbers(context, option, value):
    """A tuple of numbers from text with commas."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers") from None


def sizes(option: str, text: str, symbols: bool = False) -> list:
    """The numbers in `1x3x224x224`, and names where `symbols`."""
    dims = text.split("x")
    for dim in dims:
        # Python reads no number of thousands of digits.
        number = dim.isdecimal() and len(dim) <= 18 and int(dim)
        if not number and not (symbols and dim.isidentifier()):
            raise click.UsageError(f"--{option} {text}: expected sizes like 1x3x224x224")
    return [int(dim) if dim.isdecimal() else dim for dim in dims]


def _named_sizes(context, option, values):
    """Input name -> sizes, from texts like `image=1x3x224x224`."""
    shapes = {}
    for text in values:
        name, equals, dims = text.rpartition("=")
        if not equals:
            raise click.UsageError(f"--shape {text}: expected an input's name and =1x3x224x224")
        shapes[name] = sizes("shape", dims)
    return shapes


def check_outputs(outputs: dict, inputs: dict) -> None:
    """Refuse an output, option -> path, that is another output or one of the inputs."""
    seen = {realpath(path): name for name, path in inputs.items() if path != "-"}
    for name, path in outputs.items():
        if path not in (None, "-") and seen.setdefault(realpath(path), name) != name:
            raise click.UsageError(f"{name} and {seen[realpath(path)]} name one file")


def data_of(calibration: Any) -> Any:
    """The DATA of --calibrate, "-" where there is none."""
    return "-" if calibration is None else calibration.data


def group(*options: Callable) -> Callable:
    """A decorator that gives a command several options, in that order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Text, as a Path would drop the slash that ends a folder's name, and take `./-` for `-`. The code
# that reads the file says whether it can be read.
model = click.argument("model")
output = click.option(
    "-o", "--output", metavar="FILE", help="Where to write; - for standard output."
)
force = click.option("--force", is_flag=True, help="Overwrite an existing output.")
json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
labels = click.option(
    "--labels", metavar="NAME", help="Array or column of the labels, or a .npy file."
)
betas = click.option(
    "--beta",
    "betas",
    metavar="GRID",
    default="0.7:1.0:0.01",
    show_default=True,
    help="What to try; the original, at 1, is tried too.",
)
providers = click.option(
    "--providers",
    metavar="LIST",
    callback=names,
    help="ONNX Runtime's execution providers.  [default: all that are there but TensorRT's]",
)

shapes = click.option(
    "--shape",
    "shapes",
    metavar="INPUT=DIMS",
    multiple=True,
    callback=_named_sizes,
    help="Size of a random input, such as image=1x3x224x224; repeatable.",
)

_calibration = group(
    click.option(
        "--calibrate",
        "calibration_data",
        metavar="DATA",
        help="Restore, on these samples, the mean and variance that steering moves in each layer: "
        "data as for sweep, without labels.",
    ),
    click.option(
        "--calibrate-samples",
        type=int,
        default=128,
        show_default=True,
        help="How many of these samples, drawn at random.",
    ),
    click.option(
        "--calibrate-seed", type=int, default=0, show_default=True, help="Seed of the draw."
    ),
)


def calibrating(command: Callable) -> Callable:
    """Give a command the options of calibration, packed into its argument `calibration`: a
    ctonnx.Calibration, or None. The options of `feeding` say how its data become batches."""

    @_calibration
    @wraps(command)
    def packed(calibration_data, calibrate_samples, calibrate_seed, feeding, **options):
        calibration = None
        if calibration_data is None:
            _refuse_given("--calibrate", "calibrate_samples", "calibrate_seed")
        else:
            from ..calibration.samples import Calibration

            calibration = Calibration(
                calibration_data, calibrate_samples, calibrate_seed, **feeding
            )
        return command(calibration=calibration, feeding=feeding, **options)

    return packed


_IMAGE_OPTIONS = "preset", "resize", "crop", "mean", "std", "skip_broken"
_feeding = group(
    click.option("--batch", "batch_size", type=int, help="Samples per run.  [default: 32]"),
    click.option(
        "--preset",
        metavar="NAME",
        help="How images are fed: plain, imagenet or caffe.  [default: plain]",
    ),
    click.option("--resize", type=int, help="Scale the shorter side of images to this."),
    click.option("--crop", type=int, help="Keep the middle, of this height and width."),
    click.option(
        "--mean",
        metavar="NUMBERS",
        callback=_numbers,
        help="Subtracted from pixels in [0, 1]: one number, or R,G,B.",
    ),
    click.option(
        "--std",
        metavar="NUMBERS",
        callback=_numbers,
        help="Divides them then: one number, or R,G,B.",
    ),
    click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read."),
)


def _refuse_given(option: str, *parameters: str) -> None:
    """Refuse parameters that are given on the command line, as `option` is not."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if parameter.name in parameters and given is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} goes with {option}")


def feeding(command: Callable) -> Callable:
    """Give a command the options on how data become batches, packed into its argument `feeding`:
    keyword arguments of `ctonnx.sweep` and `ctonnx.probe`."""

    @_feeding
    @wraps(command)
    def packed(batch_size, preset, resize, crop, mean, std, skip_broken, **options):
        transform = _transform(preset, resize=resize, crop=crop, mean=mean, std=std)
        feeding = {"batch_size": batch_size, "images": transform, "skip_broken": skip_broken}
        return command(feeding=feeding, **options)

    return packed


def fed_by_calibration(command: Callable) -> Callable:
    """Give a command that reads no other data the options of calibration and of `feeding`."""

    @feeding
    @calibrating
    @wraps(command)
    def packed(calibration, feeding, **options):
        if calibration is None:
            _refuse_given("--calibrate", "batch_size", *_IMAGE_OPTIONS)
        return command(calibration=calibration, **options)

    return packed


def _transform(preset, **options):
    """The images.Transform that the options ask for; None where none does."""
    from ..data import images

    if preset is None and all(value is None for value in options.values()):
        return None
    return images.preset_transform(preset or "plain", **options)
