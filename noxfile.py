"""What `nox` runs: lint, and the tests on the newest and on the oldest supported packages."""

import sys

import nox

nox.options.default_venv_backend = "virtualenv"


@nox.session
def lint(session):
    session.install("ruff==0.17.6")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def tests(session):
    session.install("torch==2.13.0")  # first, so that nothing asks for another build of it
    session.install(".[test]")
    parallel = "--numprocesses", "2", "--dist", "worksteal"
    session.run("pytest", *parallel, "--ignore", "tests/samples", *session.posargs)


@nox.session
def samples(session):
    """The experiments in small: what they write, and that it is sane."""
    session.install("torch==2.13.0")
    session.install(".[cpu,samples]", "pytest")
    session.run("pytest", "tests/samples", *session.posargs)


@nox.session
def oldest(session):
    """What depends on versions: the library, the rewrite and the command line."""
    if sys.version_info >= (3, 13):
        session.skip("onnxruntime 1.18 has no build for this Python")
    session.install(
        *("onnxruntime==1.18.0", "onnx==1.16.2", "numpy==1.26.4", "click==8.1.7"),
        *("ml-dtypes", "onnx-graphsurgeon", "pytest", "."),
    )
    names = (
        *("api", "cli", "files", "formula", "graphsurgeon", "layout", "op", "rewrite"),
        "validate",
    )
    session.run("pytest", *(f"tests/test_{name}.py" for name in names))
