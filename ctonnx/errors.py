"""Everything ctonnx raises on purpose.

    CtonnxError
      UsageError        a wrong argument                                    exit code 2
      NothingToDo       no activation matched, or the model is not steered  exit code 1
      CheckFailed       outputs differ from what they must be               exit code 1
      ModelError        the model cannot be read, or is unsafe to read      exit code 3
      InputFileError    another file (data, parameters, progress) cannot be read  exit code 3
      MissingDependency a package, provider or the op library is missing    exit code 4

A message is one line that says what is wrong and what to do. Any other exception is a bug here.
"""

from collections.abc import Sequence


class CtonnxError(Exception):
    """Base of all errors; `exit_code` is what the command line exits with."""

    exit_code = 1


class UsageError(CtonnxError, ValueError):
    exit_code = 2


class NothingToDo(CtonnxError):
    exit_code = 1


class CheckFailed(CtonnxError):
    exit_code = 1


class ModelError(CtonnxError):
    exit_code = 3


class InputFileError(CtonnxError):
    exit_code = 3


class MissingDependency(CtonnxError):
    exit_code = 4


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a UsageError if the argument `name` has a value that is none of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def first_line(error: object) -> str:
    """The first line of the text of an exception, or of other output."""
    return str(error).strip().partition("\n")[0][:300]


def cause(error: BaseException) -> str:
    """Type and first line of the root cause of an exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
