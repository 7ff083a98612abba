"""State dicts of T-CT models: reading them, and the pairs (beta, c) that they hold."""

from ..errors import InputFileError, UsageError
from ..optional import require


def read_checkpoint(path):
    """The state dict in a file; weights only, no code is run.

    Raises:
        InputFileError: the file cannot be read, or holds no state dict.
    """
    torch = require("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except Exception:  # Whatever the reader raises for a damaged file, or one with code in it.
        raise InputFileError(
            f"{path}: cannot be read as weights alone: save model.state_dict()"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputFileError(f"{path}: holds no state dict: save model.state_dict()")
    return {key: value.detach() for key, value in state.items()}


def arrays(state_dict):
    """Name -> array of what has dimensions in a state dict; NumPy has no bfloat16."""
    torch = require("torch")
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in state_dict.items()
        if value.dim()
    }


def pairs(state_dict):
    """Module -> {"beta" and "coeff": float32 array} of the CTUs in a state dict.

    Raises:
        UsageError: there is none, or a pair is not complete.
    """
    found = raw_pairs(state_dict)
    if not found:
        raise UsageError("the checkpoint holds no _raw_beta: it is not of a T-CT model")
    return {
        path: {key: value.float().sigmoid().numpy() for key, value in raw.items()}
        for path, raw in found.items()
    }


def raw_pairs(state_dict):
    """Module -> {"beta" and "coeff": tensor} as the state dict has them, before the sigmoid.

    Raises:
        UsageError: a pair is not complete.
    """
    found = {}
    for key, value in state_dict.items():
        path, _, last = key.rpartition(".")
        if last in ("_raw_beta", "_raw_coeff"):
            found.setdefault(path, {})[last.removeprefix("_raw_")] = value
    for path, raw in found.items():
        if len(raw) < 2 or not all(value.numel() for value in raw.values()):
            raise UsageError(f"the pair of {path!r} in the checkpoint is not complete")
    return found
