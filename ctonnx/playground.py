"""The playground: a page that runs steered models in the browser, served to this machine alone.

onnxruntime-web is fetched by npm at the first start, for it is neither ours nor small, and kept in
the user's cache folder; after that nothing leaves the machine.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


def page():
    """The folder of the page: in the installed package, or in a clone of the repository."""
    for base in (Path(__file__).parent, Path(__file__).parent.parent):
        folder = base / "samples" / "playground"
        if (folder / "index.html").is_file():
            return folder
    raise MissingDependency("the playground's page is not installed: reinstall ctonnx")


def runtime(say=lambda line: None):
    """The folder with onnxruntime-web, which npm fetches where it is not there yet.

    Args:
        say: called with a line before something is fetched.

    Raises:
        MissingDependency: it can't be fetched, is not what it must be, or there is no place for it.
    """
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    # A path that is not absolute is to be ignored: XDG Base Directory Specification. Without a
    # home folder the second stays as it is.
    cache = next(filter(os.path.isabs, places), None)
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
            # Each gets its name when it is all there, and is checked at every start.
            for name in _FILES:
                os.replace(Path(temporary, name), folder / name)
    except OSError as error:
        raise MissingDependency(
            f"{folder}: cannot be written ({error.strerror}): set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _is_complete(folder):
    """Whether all the files are in a folder, and are those of the package."""
    for name, expected in _FILES.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            return False
        if found != expected:
            return False
    return True


def _fetch(folder):
    """Put the files of the package into a folder."""
    command = ["npm", "pack", RUNTIME, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
    cannot = f"the playground needs {RUNTIME}, which npm cannot fetch"
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        raise MissingDependency(
            f"the playground needs npm to fetch {RUNTIME}, once: install Node.js ({error.strerror})"
        ) from None
    archive = next(folder.glob("*.tgz"), None)
    if done.returncode or archive is None:
        why = first_line(done.stderr) or f"npm ended with {done.returncode}"
        raise MissingDependency(f"{cannot}: connect to the network, or see `npm ping` ({why})")
    try:
        with tarfile.open(archive) as package:
            for name in _FILES:
                content = package.extractfile(f"package/dist/{name}").read()
                (folder / name).write_bytes(content)
    except (tarfile.TarError, zlib.error, KeyError, EOFError) as error:
        raise MissingDependency(
            f"{cannot}: what it gave is damaged ({first_line(error)})"
        ) from None
    if not _is_complete(folder):
        raise MissingDependency(f"{cannot}: what it gave is not the package of that version")


def server(port, say=lambda line: None):
    """A server of the page, which listens already.

    Args:
        port: where to listen on 127.0.0.1; 0 for any that is free.
        say: as for `runtime`.

    Returns:
        http.server.ThreadingHTTPServer: `serve_forever` runs it, `server_address` has the port.

    Raises:
        UsageError: the port cannot be listened on.
        MissingDependency: as `runtime`, or the page is not installed.
    """
    folders = {"": str(page()), "runtime": str(runtime(say))}

    def handler(*args):
        return _Handler(folders, *args)

    try:
        return _Server((_HOST, port), handler)
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise UsageError(f"port {port} {why}: choose another by --port") from None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # A browser that leaves a page closes what it still loads.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    """Gives files, of the runtime under /runtime/; `folders` has the two."""

    protocol_version = "HTTP/1.1"
    # As modules are loaded only as JavaScript, what the system takes them for must not matter.
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

    def __init__(self, folders, *args):
        self.folders = folders
        super().__init__(*args, directory=folders[""])

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        self.directory = self.folders["runtime" if first == "runtime" else ""]
        return super().translate_path(f"/{rest}" if first == "runtime" else path)

    def list_directory(self, path):
        self.send_error(404)

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")  # Ask whether it is still the same.
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, *args):
        pass
