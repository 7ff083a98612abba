"""Steering a PyTorch model in place: `ctonnx.torch.steer`."""

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..ctu import check_unit_interval
from ..errors import UsageError
from . import calls, fused, tracing


class Record:
    """What the calls of a steered model did: name of a function -> number of its calls.

    Attributes:
        steered: those in whose place a CT unit was.
        left: activations that ran as they are.
        watch: whether the next call looks for the latter, which takes time: the first one does.
    """

    def __init__(self) -> None:
        self.steered: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.watch = True

    @contextmanager
    def call(self) -> Iterator[None]:
        """Record one call of the model."""
        if not self.watch or torch._C._get_tracing_state():  # A trace misses what a watch sees.
            yield
            return
        with _Watch(self.left):
            yield
        if self.left:
            message = f"steer left activations as they are: {_describe(self.left)}"
            warnings.warn(message, stacklevel=6)
        self.watch = False


def _describe(left: Counter[str]) -> str:
    """The names in a counter, with the counts of those that occur more than once."""
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in left.items())


class _Watch(TorchDispatchMode):
    """Counts the activations that PyTorch runs, wherever they are called from.

    It is below `_Steering`: what comes here is not steered.
    """

    def __init__(self, left: Counter[str]) -> None:
        super().__init__()
        self._left = left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if calls.is_left(func, args, kwargs):
            self._left[str(func).removesuffix(".default")] += 1
        # Steering here would give values of the unit with gradients of the original.
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)


class _Steering(TorchFunctionMode):
    """While active in a thread, CT units take the place of activations."""

    def __init__(self, parameters: Sequence[Tensor], record: Record) -> None:
        super().__init__()
        self._parameters = parameters
        self._record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = tracing.NAMES.get(func)
        if name is None:
            return func(*args, **kwargs)
        if func in fused.FUSED:
            result = fused.replace(self._unit, func, args, kwargs)
        else:
            result = self._replace(func, args, kwargs)
        if result is NotImplemented:
            if func in fused.FUSED and torch._C._get_tracing_state():
                self._record.left[name] += 1
            return func(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            self._record.steered[name] += 1
        return result

    def _replace(self, func, args, kwargs):
        activation = calls.read_call(func, args, kwargs)
        if activation is None:
            return NotImplemented
        (x, slope, lower, upper), destination = activation
        if destination is not None:
            x = x.clone()  # The unit's gradient needs the input, which is overwritten.
        y = self._unit(x, slope, lower, upper)
        source = calls.split_input(args, kwargs)[0]
        if source.is_quantized:
            y = fused.requantize(y, source, unit_range=(lower, upper) == (0.0, 1.0))
        return y if destination is None else destination.copy_(y)

    def _unit(self, x, slope=None, lower=None, upper=None):
        if slope is not None and not isinstance(slope, Tensor):
            slope = torch.full([], slope, dtype=torch.float64)
        return torch.ops.ctonnx.ctu(x, *self._parameters, slope, lower, upper)


class _Steered:
    """Marks a steered model, as a base of its class."""

    _record: Record

    @staticmethod
    def _run() -> AbstractContextManager:
        """What a call runs in."""
        raise NotImplementedError


class _Handle:
    """The steering of a model: `remove()`, or the end of a `with` block, undoes it.

    Attributes:
        steered, left: Counters of the names of functions, summed over the model's calls: the
            activations that were steered, and the others. The latter are looked for in the first
            call only.
    """

    def __init__(self, model: nn.Module, original: type[nn.Module], record: Record) -> None:
        self._model = model
        self._original: type[nn.Module] | None = original
        self.steered, self.left = record.steered, record.left

    def remove(self) -> None:
        """Undo the steering; a second call does nothing."""
        if self._original is not None:
            self._model.__class__ = self._original
            self._original = None

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def steer(model: nn.Module, beta: float, coeff: float = 0.5) -> _Handle:
    """Steer what `model(...)` computes: every piecewise-affine activation in it, whether it is a
    module, a function or a method of a tensor, in place or not.

    Clamps to tensors and clamps that guard against small numbers are arithmetic and stay, as in the
    ONNX model; so do `maximum`, `minimum` and `where`. Weights and modules stay as they are: calls
    go through a subclass of the model's class until the handle is removed. Steering does not reach
    what runs outside the call or in other threads, like the recomputation of activation
    checkpointing. Activations that it does not reach inside, like those in compiled code, are
    counted in the handle, and the first call that has some warns. int8 modules keep the range that
    was calibrated.

    Args:
        model: nn.Module, changed in place.
        beta, coeff: numbers in [0, 1].

    Returns:
        A handle: `remove()` undoes the steering, and so does the end of a `with` block. Its
        Counters `steered` and `left` hold the names of the functions that were steered and left.

    Raises:
        UsageError: a wrong argument; the model or a part of it is already steered, or compiled.

    >>> model = nn.ReLU()
    >>> with steer(model, beta=0.85):
    ...     print(model(torch.tensor([0.0])))
    tensor([0.0520])
    >>> model(torch.tensor([0.0]))
    tensor([0.])
    """
    beta, coeff = check_unit_interval("beta", beta), check_unit_interval("coeff", coeff)
    check_plain(model)
    if is_steered(model):
        raise UsageError("the model is already steered: call remove() of that handle first")
    _reach_what_is_no_call()
    original, record = type(model), Record()
    model.__class__ = _steered_class(original, beta, coeff, record)
    return _Handle(model, original, record)


def _tensors(beta: float, coeff: float) -> list[Tensor]:
    # The ONNX op has float32 parameters too.
    return [torch.tensor(value, dtype=torch.float32) for value in (beta, coeff)]


def _steered_class(
    original: type[nn.Module], beta: float, coeff: float, record: Record
) -> type[nn.Module]:
    """The subclass of a model's class whose calls are steered."""

    parameters = _tensors(beta, coeff)

    def steering():
        return _Steering(parameters, record)

    @contextmanager
    def run():
        with record.call(), steering():
            yield

    def call(self, *args, **kwargs):
        with steering() if torch.compiler.is_dynamo_compiling() else run():
            return original.__call__(self, *args, **kwargs)

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        # A tracer of torch.fx calls this, and nothing else.
        proxy = tracing.proxy_in(args, kwargs)
        if proxy is None:
            return original.forward(self, *args, **kwargs)
        with tracing.into_activations(proxy.tracer):
            result = original.forward(self, *args, **kwargs)
        tracing.redirect_activations(proxy.tracer.graph, steered_call, (beta, coeff))
        return result

    def refuse(self):
        raise UsageError("TorchScript cannot compile a steered model: use torch.jit.trace")

    @contextmanager
    def as_original(module):
        module.__class__ = original
        try:
            yield
        finally:
            module.__class__ = steered

    # A graph writes `__call__` and `forward` into the class that it has.
    def recompile(self):
        with as_original(self):
            return self.recompile()

    def deepcopy(self, memo):
        with as_original(self):
            other = copy.deepcopy(self, memo)
        other.__class__ = _steered_class(type(other), beta, coeff, record)
        return other

    members = {
        "_record": record,
        "_run": staticmethod(run),
        "__call__": call,
        "forward": forward,
        "__prepare_scriptable__": refuse,
        "__module__": original.__module__,
    }
    if issubclass(original, torch.fx.GraphModule):
        members |= {"recompile": recompile, "__deepcopy__": deepcopy}
    steered: Any = type(original.__name__, (_Steered, original), members)
    return steered


@functools.cache
def _reach_what_is_no_call() -> None:
    """Let steering reach what neither `__call__` nor a mode sees.

    Steered calls run the Python source of functions of torch.jit.script and torch.jit.trace, as
    torch.compile does. Interpreters of torch.fx, which torch.export uses, run a graph node by node.
    """
    call_script, run_graph = torch.jit.ScriptFunction.__call__, torch.fx.Interpreter.run

    def call(self, *args, **kwargs):
        source = getattr(self, "_torchdynamo_inline", None)
        modes = torch.overrides._get_current_function_mode_stack()
        if source is None or not any(isinstance(mode, _Steering) for mode in modes):
            return call_script(self, *args, **kwargs)
        return source(*args, **kwargs)

    @functools.wraps(run_graph)
    def run(self, *args, **kwargs):
        module = self.module
        with type(module)._run() if isinstance(module, _Steered) else nullcontext():
            return run_graph(self, *args, **kwargs)

    torch.jit.ScriptFunction.__call__ = call
    torch.fx.Interpreter.run = run


def steered_call(name: str, beta: float, coeff: float, *args: Any, **kwargs: Any) -> Any:
    """Call a function of tracing.NAMES steered: what graphs of torch.fx call."""
    with _Steering(_tensors(beta, coeff), Record()):
        return tracing.FUNCTIONS[name](*args, **kwargs)


@contextmanager
def refuse_half_steered(model: object) -> Iterator[None]:
    """While the model runs, look for activations that the steering of its parts leaves.

    Raises:
        UsageError: there are some, at the end.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    records = {type(part)._record for part in parts if isinstance(part, _Steered)}
    before = {record: Counter(record.left) for record in records}
    for record in records:
        record.watch = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "steer left activations")
        yield
    left = Counter[str]()
    for record in records:
        left += record.left - before[record]
    if left:
        raise half_steered(_describe(left))


def half_steered(what: str) -> UsageError:
    """The error for a model in which steering does not reach something."""
    return UsageError(
        f"the model is half steered: steer does not reach {what}; call activations from Python, "
        "like torch.relu"
    )


def is_steered(model: nn.Module) -> bool:
    """Whether the model or a part of it is steered by `steer`."""
    return any(isinstance(module, _Steered) for module in model.modules())


def is_steered_whole(model: nn.Module) -> bool:
    """Whether the model itself is steered, and not only parts of it."""
    return isinstance(model, _Steered)


def check_plain(model: nn.Module) -> None:
    """Raise UsageError where `model` is no nn.Module, or has a compiled or DataParallel part."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
            raise UsageError("the model is compiled: steer it before torch.jit or torch.compile")
        if isinstance(module, nn.DataParallel):
            raise UsageError("DataParallel runs copies of the model: take its `module`")
