"""The command line: each command parses, calls and prints. Only this package knows click."""

import signal
import sys
from io import TextIOWrapper

import click

from ..errors import CtonnxError, MissingDependency
from .bench import bench
from .doctor import doctor
from .export import export
from .inspect import inspect
from .output import say
from .patch import patch
from .playground import playground
from .probe import probe
from .set import set_
from .sweep import sweep
from .tune import tune
from .unpatch import unpatch
from .validate import validate

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="ctonnx")
@click.pass_context
def cli(context):
    """Steer ONNX models by one number: Curvature Tuning (arXiv 2502.07783) without training."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (
    patch,
    inspect,
    set_,
    unpatch,
    sweep,
    probe,
    tune,
    validate,
    bench,
    export,
    doctor,
    playground,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and its exit code."""
    # As on Ctrl-C, nothing half-done is left behind.
    for name in "SIGTERM", "SIGHUP":  # Windows has no SIGHUP.
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    for stream in sys.stdout, sys.stderr:
        # A name may hold what the terminal's encoding lacks.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not standalone, as click would print its usage errors over several lines.
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        say(f"ctonnx: {error.format_message()}")
        code = error.exit_code
    except CtonnxError as error:
        say(f"ctonnx: {error}")
        code = error.exit_code
    except OSError as error:
        say(f"ctonnx: {error.filename or 'standard output'}: {error.strerror}")
        code = 1
    except MemoryError:
        say("ctonnx: out of memory: close other programs, or take a smaller model or batch")
        code = MissingDependency.exit_code
    except (click.Abort, KeyboardInterrupt):
        # A second Ctrl-C would end Python while it shuts down.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say("ctonnx: interrupted")
        code = _INTERRUPTED
    sys.exit(code)
