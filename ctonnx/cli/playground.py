"""`ctonnx playground`."""

from contextlib import suppress

import click

from .output import say


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8710, show_default=True, help="0 for any."
)
def playground(port):
    """Serve a page with sliders for beta and c to a local browser.

    It shows a decision boundary, a regression curve and a reader of digits, run by onnxruntime-web,
    which npm fetches at the first start. Ctrl-C ends it.
    """
    from ..playground import server

    with server(port, say) as serving:
        host, port = serving.server_address[:2]
        click.echo(f"http://{host}:{port}/")
        say("open this in a browser; Ctrl-C ends the playground")
        with suppress(KeyboardInterrupt):
            serving.serve_forever()
