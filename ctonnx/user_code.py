"""The user's own functions: importing one by its name, `PKG:FUNCTION`, and calling it."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .errors import CtonnxError, UsageError, cause


def function_named(target: str) -> Callable:
    """Import the function that `target`, "package.module:function", names.

    Modules in the current folder are found too.

    Raises:
        UsageError: there is no such function.
    """
    module, _, name = target.partition(":")
    # Not removed afterwards, as for `python -m`: the module may import more when it runs.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(module)
    except Exception as error:  # The user's module raises whatever it likes.
        raise UsageError(f"{module}: cannot be imported: {cause(error)}") from error
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise UsageError(f"{target}: the module has no function of that name")
    return value


def call(function: Callable, name: str, *arguments: Any) -> Any:
    """Call a function of the user's and return its result.

    Args:
        function: the function.
        name: its name in messages.
        *arguments: passed on.

    Raises:
        UsageError: the function raises an exception.
    """
    try:
        return function(*arguments)
    except CtonnxError:
        raise
    except Exception as error:  # The user's function raises whatever it likes.
        raise UsageError(f"{name}: fails when it is called: {cause(error)}") from error
