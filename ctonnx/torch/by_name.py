"""PyTorch models by name, for the command line: loading, running and exporting them.

A name, called `target` here, is `PKG:FACTORY`, a function of the user's that returns the model, or
the path of a .pt2 file of torch.export.save.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from .. import user_code
from ..errors import CtonnxError, ModelError, NothingToDo, UsageError, cause
from ..model import files
from ..model.values import arrays
from ..rewriting import weights
from ..rewriting.checkpoint import pairs, read_checkpoint, weight_arrays
from ..rewriting.steer import Report, nothing_matched
from ..rewriting.steer import steer as steer_proto
from ..rewriting.steered import SteeredModel
from .exporting import refuse_unsteered, resteer, run_exporter
from .steering import is_steered, refuse_half_steered, steer
from .tct import restore
from .unit import CTU

# The sizes of an input; a name stands for any size.
Shape = Sequence[int | str]


def load_model(target: str) -> torch.nn.Module | ExportedProgram:
    """Load the model that `target` names.

    Args:
        target: `package.module:function`, imported from the current folder too and called without
            arguments, or the path of a .pt2 file.

    Returns:
        nn.Module, in eval mode, or torch.export.ExportedProgram.

    Raises:
        UsageError: there is no such function, it fails, or returns something else.
        ModelError: the file cannot be read.
    """
    with redirect_stdout(sys.stderr):  # What the user's code prints is no result.
        return _load_program(target) if target.endswith(".pt2") else _call_factory(target)


def _call_factory(target: str) -> torch.nn.Module:
    module, _, name = target.partition(":")
    if not module or not name:
        raise UsageError(f"{target}: expected PKG:FACTORY, or a .pt2 file of torch.export.save")
    factory = user_code.function_named(target)
    model = user_code.call(factory, target)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{target}: returns a {type(model).__name__}, expected an nn.Module")
    return model.eval()


def _load_program(path: str) -> ExportedProgram:
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch.export.load raises many types for a damaged file.
        raise ModelError(f"{path}: cannot be read by torch.export: {cause(error)}") from None


def _load_module(target: str) -> torch.nn.Module:
    model = load_model(target)
    if isinstance(model, ExportedProgram):
        raise UsageError(f"{target}: a .pt2 file cannot be steered here: give a PKG:FACTORY")
    return model


class _Record(TorchFunctionMode):
    """Keeps the outputs of all CT units, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "ctu":
            self.values.append(result.detach().clone())
        return result


def run_model(
    target: str,
    inputs: Sequence[np.ndarray],
    names: Sequence[str],
    beta: float | None = None,
    coeff: float | None = None,
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Run the model that `target` names, steered.

    Args:
        target: as for `load_model`, but not a file.
        inputs: arrays, in the order of the model's arguments.
        names: names of its outputs, in order; further ones are called "output N".
        beta, coeff: numbers to steer it with, where it has no CT units of its own.

    Returns:
        dict from name to array of the outputs, and the list of the outputs of its CT units.

    Raises:
        UsageError: as for `load_model`; the model fails with these inputs, returns anything but
            tensors, or has no CT units while beta or coeff is None.
    """
    model = _load_module(target)
    has_units = is_steered(model) or any(isinstance(module, CTU) for module in model.modules())
    if has_units:
        steering = nullcontext()
    elif beta is None or coeff is None:
        name = "beta" if beta is None else "c"
        raise UsageError(
            f"{target}: has no CT units, and the CTUs of the ONNX model do not share one {name}: "
            "make it return the T-CT model, by ctonnx.torch.restore(model, state_dict)"
        )
    else:
        steering = steer(model, beta, coeff)
    record = _Record()
    try:
        with redirect_stdout(sys.stderr), steering, torch.no_grad(), record:
            result = model(*map(torch.from_numpy, inputs))
        values = [_array(value) for value in _flatten(result)]
    except CtonnxError as error:
        raise UsageError(f"{target}: {error}") from None
    except Exception as error:  # The user's module may raise anything.
        raise UsageError(f"{target}: fails with the model's inputs: {cause(error)}") from error
    names = [*names, *(f"output {i}" for i in range(len(names), len(values)))]
    outputs = arrays(zip(names, values, strict=False))
    return outputs, [_array(value) for value in record.values]


def differing_weights(target: str, initializers: Iterable[TensorProto]) -> list[str]:
    """The names of the initializers that differ from the model's weights of the same name.

    Args:
        target: as for `run_model`.
    """
    trained = weight_arrays(_load_module(target).state_dict())
    return list(weights.differing(trained, initializers))


def _flatten(result: Any) -> list[Any]:
    """The values in nested dicts, tuples and lists, in the exporters' order, without None."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return [value for part in result for value in _flatten(part)]
    return [] if result is None else [result]


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"returns an output of type {type(value).__name__}, expected tensors")
    value = value.detach().cpu()
    # NumPy lacks bfloat16, and ONNX Runtime returns no such arrays.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def export_model(
    target: str,
    shapes: Sequence[Shape],
    output: str | os.PathLike[str],
    *,
    beta: float | None = None,
    coeff: float = 0.5,
    checkpoint: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> tuple[Report, Path | str]:
    """Export the model that `target` names, steered.

    Args:
        target: as for `load_model`.
        shapes: shapes of its float32 inputs, in order; none for a .pt2 file, which has its own.
        output: where to write, "-" for standard output.
        beta, coeff: parameters of all activations, or of those without a pair in `checkpoint`.
        checkpoint: the path of a T-CT state dict.
        force: overwrite an existing file.

    Returns:
        Report, and the Path written ("-" as it is).

    Raises:
        UsageError: a wrong argument, or as for `load_model`, `steer` and `restore`.
        InputFileError: the checkpoint cannot be read.
        ModelError: the model cannot be read or exported.
        NothingToDo: there is nothing to steer.
        MissingDependency: onnxscript is not installed.
    """
    output = files.check_output(output, force)
    # PyTorch logs and warns about its internals; its errors are exceptions.
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with redirect_stdout(sys.stderr):  # What the user's code prints is no result.
        model = load_model(target)
        if isinstance(model, ExportedProgram):
            if shapes or checkpoint:
                raise UsageError(
                    f"{target}: has its own inputs and weights: leave out --input and --checkpoint"
                )
            proto, report = _export_program(target, model, beta, coeff)
        else:
            if not shapes:
                raise UsageError(
                    f"{target}: the shape of its input is missing: --input 1x3x224x224"
                )
            proto, report = _export_module(target, model, shapes, beta, coeff, checkpoint)
    return report, files.save(proto, output, force)


_NO_UNIT = "has no CT unit: give --beta or --checkpoint"


def _export_program(
    target: str,
    program: ExportedProgram,
    beta: float | None,
    coeff: float,
) -> tuple[ModelProto, Report]:
    proto = _to_onnx(target, program, (), {})
    if beta is not None:
        return proto, steer_proto(proto, beta, coeff)
    try:
        return proto, resteer(proto)
    except NothingToDo:
        raise NothingToDo(f"{target}: {_NO_UNIT}") from None


def _export_module(
    target: str,
    model: torch.nn.Module,
    shapes: Sequence[Shape],
    beta: float | None,
    coeff: float,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[ModelProto, Report]:
    state = None
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        model = restore(model, state)
    args, options = _examples(shapes)
    with nullcontext() if beta is None else steer(model, beta, coeff), refuse_half_steered(model):
        proto = _to_onnx(target, model, args, options)
    try:
        report = resteer(proto)
    except NothingToDo:
        if beta is not None:
            skipped = [a for a in SteeredModel(proto).activations if a.status == "skipped"]
            raise NothingToDo(f"{target}: {nothing_matched(skipped)}") from None
        if state is not None:
            pairs(state)  # raises: it has none
        raise NothingToDo(f"{target}: {_NO_UNIT}") from None
    if beta is not None:
        refuse_unsteered(report)
    return proto, report


def _examples(shapes: Sequence[Shape]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Example arguments of these shapes, and the exporter's options for their named sizes."""
    # 2 for any size, as the exporter would make a constant of 1.
    sizes = [[2 if isinstance(d, str) else d for d in shape] for shape in shapes]
    dims = tuple(
        {i: torch.export.Dim(d) for i, d in enumerate(shape) if isinstance(d, str)}
        for shape in shapes
    )
    return tuple(map(torch.zeros, sizes)), {"dynamic_shapes": dims} if any(dims) else {}


def _to_onnx(
    target: str,
    model: torch.nn.Module | ExportedProgram,
    args: tuple[torch.Tensor, ...],
    options: dict[str, Any],
) -> ModelProto:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run_exporter(model, args, True, options)
    except CtonnxError:
        raise
    except Exception as error:  # The exporter may raise anything, as may the model when it runs.
        raise ModelError(f"{target}: cannot be exported: {cause(error)}") from error
