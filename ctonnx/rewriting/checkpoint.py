"""State dicts of T-CT models: reading them, and the pairs (beta, c) in them.

They need PyTorch, which is imported only when a function is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputFileError, UsageError
from ..optional import require

if TYPE_CHECKING:
    from torch import Tensor


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict in a file of `torch.save`, without running code in it.

    Returns:
        dict from name to tensor, on the CPU.

    Raises:
        InputFileError: the file cannot be read, or contains no state dict.
        MissingDependency: PyTorch is not installed.
    """
    torch = require("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except Exception:  # torch.load raises many types for a damaged file, or one with code in it.
        raise InputFileError(
            f"{path}: cannot be read as weights alone: save model.state_dict()"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputFileError(f"{path}: contains no state dict: save model.state_dict()")
    return {key: value.detach() for key, value in state.items()}


def weight_arrays(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that have dimensions, as arrays by name.

    bfloat16, which NumPy lacks, becomes float32.
    """
    torch = require("torch")
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in state_dict.items()
        if value.dim()
    }


def spellings(names: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield what the names of a state dict may be in the model that it comes from.

    As they are; without what DataParallel and torch.compile put into them; and without the modules
    around the model, whose names all share.

    Yields:
        dict from name to what it may be, different for each.
    """
    plain = [without_wrappers(name) for name in names]
    paths = [name.split(".") for name in plain]
    shared = 0
    for level in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    inner = [[".".join(path[depth:]) for path in paths] for depth in range(1, shared + 1)]
    for spelled in (list(names), plain, *inner):
        if len(set(spelled)) == len(spelled):
            yield dict(zip(names, spelled, strict=True))


def without_wrappers(name: str) -> str:
    """The name of a weight or module without the modules of DataParallel and torch.compile."""
    return re.sub(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.", "", name)


def pairs(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """The pairs of a T-CT model: module -> {"beta" and "coeff": float32 array in [0, 1]}.

    Raises:
        UsageError: there is no pair, or one is incomplete.
    """
    raw = raw_pairs(state_dict)
    if not raw:
        raise UsageError("the checkpoint has no _raw_beta: it does not come from a T-CT model")
    return {
        path: {name: value.float().sigmoid().numpy() for name, value in pair.items()}
        for path, pair in raw.items()
    }


def raw_pairs(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As `pairs`, but the tensors of the state dict, whose sigmoids beta and c are; may be empty.

    Raises:
        UsageError: a pair is incomplete.
    """
    raw: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        path, _, last = key.rpartition(".")
        if last in ("_raw_beta", "_raw_coeff"):
            raw.setdefault(path, {})[last.removeprefix("_raw_")] = value
    for path, pair in raw.items():
        if len(pair) < 2 or not all(value.numel() for value in pair.values()):
            raise UsageError(f"the checkpoint's pair for {path!r} is incomplete")
    return raw
