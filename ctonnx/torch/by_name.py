"""PyTorch models by name: `PKG:FACTORY`, a function that makes one, or a file of torch.export."""

import logging
import os
import sys
import warnings
from contextlib import nullcontext, redirect_stdout

import torch

from .. import user_code
from ..errors import CtonnxError, ModelError, NothingToDo, UsageError, cause
from ..model import files
from ..model.values import arrays
from ..rewriting import rewrite
from ..rewriting.checkpoint import arrays as weights_of
from ..rewriting.checkpoint import pairs, read_checkpoint
from ..rewriting.params import differing as differing_from
from .export import exported, resteer
from .steering import is_steered, steer
from .tct import restore
from .unit import CTU


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
    with redirect_stdout(sys.stderr):  # What the user's code prints is no result.
        return _program(target) if target.endswith(".pt2") else _made(target)


def _made(target):
    module, _, name = target.partition(":")
    if not module or not name:
        raise UsageError(f"{target}: expected PKG:FACTORY, or a .pt2 file of torch.export.save")
    factory = user_code.load(target)
    model = user_code.call(factory, target)
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
        UsageError: as for `load`; it fails with these inputs, gives what is no tensor, or holds no
            CT units and beta or coeff is None.
        ModelError: as for `load`.
    """
    model = load(target)
    if isinstance(model, torch.export.ExportedProgram):
        raise UsageError(f"{target}: is a graph, which cannot be steered: name a PKG:FACTORY")
    own = is_steered(model) or any(isinstance(module, CTU) for module in model.modules())
    for name, value in ("beta", beta), ("c", coeff):
        if value is None and not own:
            raise UsageError(
                f"{target}: holds no CT units, and those of the ONNX model have no {name} in "
                "common: let it give the T-CT model, by ctonnx.torch.restore(model, state_dict)"
            )
    steering = nullcontext() if own else steer(model, beta, coeff)
    record = _Record()
    try:
        with redirect_stdout(sys.stderr), steering, torch.no_grad(), record:
            result = model(*map(torch.from_numpy, inputs))
        values = [_array(value) for value in _flat(result)]
    except CtonnxError as error:
        raise UsageError(f"{target}: {error}") from None
    except Exception as error:  # Whatever the user's module raises.
        raise UsageError(f"{target}: fails with the model's inputs: {cause(error)}") from error
    names = [*names, *(f"output {i}" for i in range(len(names), len(values)))]
    outputs = arrays(zip(names, values, strict=False))
    return outputs, [_array(value) for value in record.values]


def differing(target, initializers):
    """The names of the TensorProtos that are not what the model that `target` names has under their
    name; `target` as for `run`."""
    return list(differing_from(weights_of(load(target).state_dict()), initializers))


def _flat(result):
    """What nested dicts, tuples and lists hold, in order; as exporters do it, without None."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return [value for part in result for value in _flat(part)]
    return [] if result is None else [result]


def _array(value):
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"gives an output of type {type(value).__name__}, expected tensors")
    value = value.detach().cpu()
    # NumPy lacks that type, and ONNX Runtime gives no such arrays.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def export(target, shapes, output, *, beta=None, coeff=0.5, checkpoint=None, force=False):
    """Export the model that `target` names, steered.

    Args:
        target: as for `load`.
        shapes: of its float32 inputs, lists of sizes and of names for dimensions that may have any;
            none for a .pt2 file, which knows its own.
        output: where to write.
        beta, coeff: of all activations, or of those that `checkpoint` has no pair for.
        checkpoint: the path of a T-CT state dict.

    Returns:
        rewrite.Report, and the Path written.

    Raises:
        UsageError: a wrong argument, or as for `load`, `steer` and `restore`.
        ModelError: the model cannot be read or exported.
        NothingToDo: there is nothing to steer.
        MissingDependency: onnxscript is missing.
    """
    output = files.check_output(output, force)
    with redirect_stdout(sys.stderr):  # What the user's code prints is no result.
        report, proto = _built(target, shapes, beta, coeff, checkpoint)
    return report, files.save(proto, output, force)


def _arguments(shapes):
    """The example arguments, whether the newer exporter takes them, and its options."""
    # Of a size of 1 it would make a constant.
    examples = [torch.zeros([2 if isinstance(d, str) else d for d in shape]) for shape in shapes]
    dims = [
        {i: torch.export.Dim(d) for i, d in enumerate(shape) if isinstance(d, str)}
        for shape in shapes
    ]
    return tuple(examples), True, {"dynamic_shapes": tuple(dims)} if any(dims) else {}


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
        state = read_checkpoint(checkpoint)
        model = restore(model, state)
    steering = nullcontext() if beta is None or program else steer(model, beta, coeff)
    try:
        with steering, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = exported(model, *_arguments(shapes))
    except CtonnxError:
        raise
    except Exception as error:  # Whatever the exporter raises, or the model when it runs.
        raise ModelError(f"{target}: cannot be exported: {cause(error)}") from error
    if program and beta is not None:
        return rewrite.steer(proto, beta, coeff), proto
    try:
        return resteer(proto), proto
    except NothingToDo:
        if beta is None and checkpoint is not None:
            pairs(state)  # It says that there is none.
        lack = "holds no CT unit: give --beta or --checkpoint"
        if beta is not None:
            skipped = [a for a in rewrite.find(proto) if a.status == "skipped"]
            lack = rewrite.nothing_matched(skipped)
        raise NothingToDo(f"{target}: {lack}") from None
