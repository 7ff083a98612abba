"""`ctonnx doctor`."""

import sys

import click

from ..errors import MissingDependency
from . import options
from .output import print_json, say


@click.command()
@options.json
def doctor(as_json):
    """Tell what is installed, and whether the op library works."""
    from ..doctor import examine

    report = examine()
    if as_json:
        print_json(**report)
    else:
        for name, version in report["packages"].items():
            click.echo(f"{name:20} {version or 'not installed'}")
        click.echo(f"{'providers':20} {', '.join(report['providers']) or 'none'}")
        click.echo(f"{'op library':20} {report['library'] or 'not installed'}")
        click.echo(f"{'CPU kernels':20} {report['cpu_level'] or 'none'}")
        click.echo(f"{'CUDA kernels':20} {report['cuda_kernels'] or 'none'}")
        click.echo(f"{'CUDA':20} {report['cuda']}")
        for problem in report["problems"]:
            say(f"problem: {problem}")
        click.echo("works" if report["ok"] else "the op library does not work, see above")
    if not report["ok"]:
        sys.exit(MissingDependency.exit_code)
