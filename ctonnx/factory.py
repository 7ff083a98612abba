"""PyTorch models by name: `PKG:FACTORY`, a function that makes one, or a file of torch.export."""

import logging
import os
import sys
import warnings
from contextlib import redirect_stdout

from . import files, objects, rewrite
from .errors import CtonnxError, ModelError, NothingToDo, UsageError
from .objects import cause
from .runs import arrays
from .torch import (  # torch, or the error that it is missing
    CTU,
    is_steered,
    read_checkpoint,
    restore,
    steer,
    torch,
)
from .torch_export import exported, resteer


def load(target):
    """The model that `target` names.

    Args:
        target: `package.module:function`, imported from the current folder too and called without
            arguments, or the path of a .pt2 file.

    Returns:
        nn.Module, in eval mode, or torch.export.ExportedProgram.

    Raises:
        UsageError: there is no such function, it fails, or gives something else.
        ModelError: the file cannot be read.
    """
    if target.endswith(".pt2"):
        return _program(target)
    module, _, name = target.partition(":")
    if not module or not name:
        raise UsageError(f"{target}: expected PKG:FACTORY, or a .pt2 file of torch.export.save")
    factory = objects.load(target)
    try:
        model = factory()
    except Exception as error:
        raise UsageError(f"{target}: fails when it is called: {cause(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{target}: gives a {type(model).__name__}, expected an nn.Module")
    return model.eval()


def _program(path):
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read by torch.export: {cause(error)}") from None


class _Record(torch.overrides.TorchFunctionMode):
    """Keeps what every CT unit gives, in order."""

    def __init__(self):
        super().__init__()
        self.values = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "ctu":
            self.values.append(result.detach().clone())
        return result


def run(target, inputs, names, beta=None, coeff=None):
    """Run the model that `target` names, steered.

    Args:
        target: as for `load`, but of a function.
        inputs: arrays, in the order of its arguments.
        names: of its outputs, in order; one more is called "output N".
        beta, coeff: numbers to steer it with, where it holds no CT units of its own.

    Returns:
        dict from name to array of the outputs, and the list of what its CT units gave.

    Raises:
        UsageError: as for `load`; it fails with these inputs, or holds no CT units and beta is
            None.
        ModelError: as for `load`.
    """
    model = load(target)
    if isinstance(model, torch.export.ExportedProgram):
        raise UsageError(f"{target}: is a graph, which cannot be steered: name a PKG:FACTORY")
    if not is_steered(model) and not any(isinstance(m, CTU) for m in model.modules()):
        if beta is None:
            raise UsageError(
                f"{target}: holds no CT units, and those of the ONNX model have no beta in common "
                "to steer it with"
            )
        steer(model, beta, coeff)
    record = _Record()
    try:
        with torch.no_grad(), record:
            result = model(*map(torch.from_numpy, inputs))
    except Exception as error:  # Whatever the user's module raises.
        raise UsageError(f"{target}: fails with the model's inputs: {cause(error)}") from error
    values = list(result.values() if isinstance(result, dict) else _flat(result))
    names = [*names, *(f"output {i}" for i in range(len(names), len(values)))]
    outputs = arrays((name, value.numpy()) for name, value in zip(names, values, strict=False))
    return outputs, [value.numpy() for value in record.values]


def _flat(result):
    """The tensors in nested tuples and lists."""
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in _flat(part)]
    return [result]


def export(target, shapes, output, *, beta=None, coeff=0.5, checkpoint=None, force=False):
    """Export the model that `target` names, steered.

    Args:
        target: as for `load`.
        shapes: of its float32 inputs; none for a .pt2 file, which knows its own.
        output: where to write.
        beta, coeff: of all activations, or of those that `checkpoint` has no pair for.
        checkpoint: the path of a T-CT state dict.

    Returns:
        rewrite.Report, and the Path written.

    Raises:
        UsageError: a wrong argument, or as for `load`, `steer` and `restore`.
        ModelError: the model cannot be read or exported.
        NothingToDo: there is nothing to steer.
        EnvironmentLacks: onnxscript is missing.
    """
    output = files.check_output(output, force)
    with redirect_stdout(sys.stderr):  # What the user's code prints is no result.
        report, proto = _built(target, shapes, beta, coeff, checkpoint)
    return report, files.save(proto, output, force)


def _built(target, shapes, beta, coeff, checkpoint):
    """What `export` writes: rewrite.Report and ModelProto."""
    # PyTorch's log and warnings are of its own inner life, and errors come as exceptions.
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    model = load(target)
    program = isinstance(model, torch.export.ExportedProgram)
    if program and (shapes or checkpoint):
        raise UsageError(f"{target}: has inputs and weights: leave --input and --checkpoint out")
    if not program and not shapes:
        raise UsageError(f"{target}: the shape of its input is missing: --input 1x3x224x224")
    if checkpoint is not None:
        model = restore(model, read_checkpoint(checkpoint))
    if beta is not None and not program:
        steer(model, beta, coeff)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = exported(model, tuple(torch.zeros(shape) for shape in shapes), True, {})
    except CtonnxError:
        raise
    except Exception as error:  # Whatever the exporter raises, or the model when it runs.
        raise ModelError(f"{target}: cannot be exported: {cause(error)}") from error
    if program and beta is not None:
        return rewrite.steer(proto, beta, coeff), proto
    try:
        return resteer(proto), proto
    except NothingToDo:
        lack = "no activation" if beta is not None else "no CT unit: give --beta or --checkpoint"
        raise NothingToDo(f"{target}: holds {lack}") from None
