"""Functions of the user's by name, `PKG:FUNCTION`."""

import importlib
import os
import sys

from .errors import CtonnxError, UsageError, cause


def load(target):
    """The function that `target`, `package.module:function`, names; the current folder counts too.

    Raises:
        UsageError: there is no such function.
    """
    module, _, name = target.partition(":")
    # For good, as for `python -m`: the module may import more when it runs.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # Whatever the user's module raises.
        raise UsageError(f"{module}: cannot be imported: {cause(error)}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"{target}: the module has no function of that name")
    return found


def call(function, name, *arguments):
    """What a function of the user's gives, called `name` in messages.

    Raises:
        UsageError: it fails.
    """
    try:
        return function(*arguments)
    except CtonnxError:
        raise
    except Exception as error:  # Whatever the user's function raises.
        raise UsageError(f"{name}: fails when it is called: {cause(error)}") from error
