"""Curvature Tuning in PyTorch: the CT unit, steering a model, and T-CT, its trainable version.

    CTU        the unit as a module, with fixed or trainable beta and c
    steer      every piecewise-affine activation of a model, modules and function calls alike
    trainable  T-CT: a pair (beta, c) for each channel of each activation module
    restore    a model from the state dict of a trained one
    export     a model with CT units as ONNX, see ctonnx.torch_export

The unit is the op `torch.ops.ctonnx.ctu`, which the ONNX exporters see as one op and PyTorch takes
apart for everything else: autograd, torch.compile, devices.
"""

import itertools
import math
import numbers
import warnings
from contextlib import ExitStack
from typing import Final

from .activations import bounds_that_bend
from .ctu import EPSILON, check_unit_interval
from .errors import EnvironmentLacks, ModelError, UsageError

try:
    import torch
except ImportError:
    raise EnvironmentLacks("PyTorch is not installed: pip install torch onnxscript") from None
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .torch_export import export

__all__ = ["CTU", "export", "restore", "steer", "trainable"]

# Where the authors' code starts training: beta 0.8, c 0.5.
RAW_BETA, RAW_COEFF = 1.386, 0.0

torch.library.define(
    "ctonnx::ctu",
    "(Tensor x, Tensor beta, Tensor coeff, Tensor? slope=None, float? lower=None,"
    " float? upper=None) -> Tensor",
)


@torch.library.impl("ctonnx::ctu", "CompositeImplicitAutograd")
def _ctu(x, beta, coeff, slope=None, lower=None, upper=None):
    """The formula of ctonnx.ctu, and with bounds those of ctonnx.activations.

    Computed in float64 for float64 and in float32 for everything else, then rounded to the type of
    `x`. Gradients are those of the smooth function, at its kinks too: `maximum` and `minimum` halve
    theirs where both sides are equal, `abs` has none at 0, where the rest is even.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, beta, coeff = x.to(compute), beta.to(compute), coeff.to(compute)
    infinite = torch.isinf(wide)
    zero = wide.new_zeros(())
    if lower is None and upper is None:
        y, distance = torch.maximum(wide, zero), wide.abs()
        if slope is None:
            y = y + _bend(distance, infinite, beta, coeff)
        else:
            slope = slope.to(compute)
            # 0 * inf would be NaN.
            below = torch.minimum(wide, zero).masked_fill(infinite & (slope == 0), 0.0)
            gap = 1.0 - slope
            bend = _bend(distance * gap.abs(), infinite, beta, coeff)
            y = y + slope * below + gap.sign() * bend
        return y.to(x.dtype)
    y = wide
    if lower is not None:
        y = torch.maximum(y, zero + lower)
    if upper is not None:
        y = torch.minimum(y, zero + upper)
    if lower is not None:
        y = y + _bend((wide - lower).abs(), infinite, beta, coeff)
    if upper is not None:
        y = y - _bend((wide - upper).abs(), infinite, beta, coeff)
    return y.to(x.dtype)


def _bend(distance, infinite, beta, coeff):
    """What smoothing adds at a `distance` >= 0 from a kink, and 0 where `infinite`."""
    # Masked before and after: the gradient of what is not taken must not be NaN either.
    distance = distance.masked_fill(infinite, 0.0)
    s = 1.0 - beta + EPSILON
    inverse = 1.0 / s
    log_term = (1.0 - coeff) * s * F.softplus(-(distance * inverse))
    gate_term = coeff * (distance * torch.sigmoid(-(beta * inverse * distance)))
    return (log_term - gate_term).masked_fill(infinite, 0.0)


class CTU(nn.Module):
    """The CT unit: ReLU with beta 1, and smoother with a smaller one.

    Args:
        beta, coeff: in [0, 1]; numbers, or tensors: one-dimensional ones hold a value for each
            channel (the last dimension of 2-D and 3-D inputs, the second of others), all others
            broadcast to the input. They need not be of one shape.
        trainable: keep them as the parameters `_raw_beta` and `_raw_coeff`, of which they are the
            sigmoids, as the authors' code has it. Else they are buffers.
        slope: of the negative side: a number as for LeakyReLU, or a Parameter as PReLU has it, one
            value or one for each of dim 1, which stays a parameter: `weight`.
        lower, upper: bounds in place of a slope: ReLU6 is CTU(lower=0, upper=6).

    Raises:
        UsageError: beta or coeff is not in [0, 1], slope is neither a number nor a Parameter, or
            slope and bounds make no activation.

    >>> CTU(beta=1.0)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    trainable: Final[bool]
    slope: Final[float]
    lower: float | None
    upper: float | None

    def __init__(self, beta=0.8, coeff=0.5, *, trainable=False, slope=0.0, lower=None, upper=None):
        super().__init__()
        self.trainable = trainable
        for name, value in (("beta", beta), ("coeff", coeff)):
            value = _checked(name, value)
            if trainable:
                self.register_parameter(f"_raw_{name}", nn.Parameter(torch.logit(value)))
            else:
                self.register_buffer(f"_{name}", value)
        weight = slope if isinstance(slope, nn.Parameter) else None
        try:
            self.slope = 0.0 if weight is not None else float(slope)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError("slope must be a number or an nn.Parameter") from None
        self.register_parameter("weight", weight)
        self.lower = self.upper = None
        if lower is not None or upper is not None:
            kept = bounds_that_bend(*(None if b is None else float(b) for b in (lower, upper)))
            if isinstance(kept, str):
                raise UsageError(f"CTU: {kept}: lower {lower}, upper {upper}")
            if weight is not None or self.slope:
                raise UsageError("CTU: slope and bounds do not go together")
            # ReLU's own bound: the unit without any.
            self.lower, self.upper = (None, None) if kept == (0.0, None) else kept

    @property
    def beta(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_beta)
        else:  # TorchScript compiles the branch that is taken.
            return self._beta

    @property
    def coeff(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_coeff)
        else:
            return self._coeff

    def forward(self, x: Tensor) -> Tensor:
        beta, coeff = self.beta, self.coeff
        if x.dim() >= 4 and beta.dim() == 1:
            beta = _on_dim_1(beta, x)
        if x.dim() >= 4 and coeff.dim() == 1:
            coeff = _on_dim_1(coeff, x)
        slope: Tensor | None = None
        weight = self.weight
        if weight is not None:
            slope = _on_dim_1(weight, x)
        elif self.slope != 0.0:
            slope = torch.full([], self.slope, dtype=torch.float64)
        return torch.ops.ctonnx.ctu(x, beta, coeff, slope, self.lower, self.upper)

    def extra_repr(self):
        parts = []
        for name in ("beta", "coeff"):
            value = getattr(self, name).detach()
            shape = tuple(value.shape)
            parts.append(f"{name}={value.item():.6g}" if value.numel() == 1 else f"{name}={shape}")
        parts += ["trainable"] * self.trainable
        if self.weight is not None:
            parts.append(f"weight={tuple(self.weight.shape)}")
        if self.slope:
            parts.append(f"slope={self.slope:g}")
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name):g}")
        return ", ".join(parts)


def _on_dim_1(values: Tensor, x: Tensor) -> Tensor:
    """One-dimensional values, shaped for dim 1 of `x`, or its only one."""
    for _ in range(x.dim() - 2):
        values = values.unsqueeze(-1)
    return values


def _checked(name, value):
    """`value` as a floating-point tensor in [0, 1]."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"{name} must be made of numbers, got {value!r}") from None
    value = value.detach().clone()
    # Written so that NaN fails too.
    if (
        not value.is_floating_point()
        or not value.numel()
        or not ((value >= 0) & (value <= 1)).all()
    ):
        raise UsageError(f"{name} must lie in [0, 1]")
    return value


# --- steering


def _relu(input, inplace=False):
    return input, {}


def _leaky_relu(input, negative_slope=0.01, inplace=False, out=None):
    return input, {"slope": negative_slope}


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    return None if training else (input, {"slope": (lower + upper) / 2})


def _prelu(input, weight):
    return input, {"slope": _on_dim_1(weight, input) if weight.dim() else weight}


def _relu6(input, inplace=False):
    return input, {"lower": 0.0, "upper": 6.0}


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False, out=None):
    return _clamp(input, min_val, max_val)


def _clamp(input, min=None, max=None, *, out=None):
    if not all(b is None or isinstance(b, numbers.Real) for b in (min, max)):
        return None  # Computed at run time.
    kept = bounds_that_bend(*(None if b is None else float(b) for b in (min, max)))
    if isinstance(kept, str):
        return None
    return input, {} if kept == (0.0, None) else dict(zip(("lower", "upper"), kept, strict=True))


def _clamp_max(input, max, *, out=None):
    return _clamp(input, None, max)


def _hardsigmoid(input, inplace=False, out=None):
    return input / 6 + 0.5 if input.is_floating_point() else input, {"lower": 0.0, "upper": 1.0}


def _spellings():
    """Function -> what reads its arguments, giving (input, parameters of the CTU) or None; and
    whether it works in place."""
    readers = {
        _relu: "relu",
        _leaky_relu: "leaky_relu",
        _rrelu: "rrelu",
        _prelu: "prelu",
        _relu6: "relu6",
        _hardtanh: "hardtanh",
        _clamp: "clamp clip clamp_min",
        _clamp_max: "clamp_max",
        _hardsigmoid: "hardsigmoid",
    }
    owners = (torch, Tensor, F, torch._C._nn)
    return {
        getattr(owner, spelled): (reader, spelled != name)
        for reader, names in readers.items()
        for name in names.split()
        for owner, spelled in itertools.product(owners, (name, f"{name}_"))
        if hasattr(owner, spelled)
    }


_SPELLINGS = _spellings()


def _read(func, args, kwargs):
    """The input, CTU parameters and target of a call that is an activation, else None.

    The target is the tensor that takes the result: the input where that changes in place, or None.
    """
    reader, in_place = _SPELLINGS.get(func, (None, False))
    found = None if reader is None else reader(*args, **kwargs)
    if found is None or not found[0].is_floating_point():
        return None
    target = kwargs.get("out")
    if target is None and (in_place or kwargs.get("inplace")):
        target = args[0] if args else kwargs["input"]
    return *found, target


class _Steering(TorchFunctionMode):
    """While active in a thread, CT units take the place of activations."""

    def __init__(self, beta, coeff):
        super().__init__()
        self._beta, self._coeff = beta, coeff

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = _read(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        x, given, target = found
        if target is not None:
            x = x.clone()  # The unit's gradient needs what is overwritten.
        slope = given.get("slope")
        if slope is not None and not isinstance(slope, Tensor):
            slope = torch.full([], slope, dtype=torch.float64)
        bounds = given.get("lower"), given.get("upper")
        y = torch.ops.ctonnx.ctu(x, self._beta, self._coeff, slope, *bounds)
        return y if target is None else target.copy_(y)


class _Steered:
    """Mixed into the class of a steered model."""


class _Handle:
    """What `steer` gives: `remove()`, or the end of a `with`, brings the original back."""

    def __init__(self, model, original):
        self._model, self._original = model, original

    def remove(self):
        """Undo the steering; a second call does nothing."""
        if self._original is not None:
            self._model.__class__ = self._original
            self._original = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()


def steer(model, beta, coeff=0.5):
    """Steer what `model(...)` computes: every piecewise-affine activation in it, whether it is a
    module, a function or a method of a tensor, in place or not.

    Clamps to tensors and those that guard against small numbers are arithmetic and stay, as in the
    ONNX model; so do `maximum` and `minimum`. Weights and modules are not touched: calls go through
    a subclass of the model's class until the handle is removed. What runs outside the call or in
    other threads, like the recomputation of activation checkpointing, is out of reach.

    Args:
        model: nn.Module, changed in place.
        beta, coeff: numbers in [0, 1].

    Returns:
        A handle: `remove()` undoes it, and so does the end of a `with` block.

    Raises:
        UsageError: a wrong argument; the model or a part of it is steered already, or compiled.

    >>> model = nn.ReLU()
    >>> with steer(model, beta=0.85):
    ...     print(model(torch.tensor([0.0])))
    tensor([0.0520])
    >>> model(torch.tensor([0.0]))
    tensor([0.])
    """
    beta, coeff = check_unit_interval("beta", beta), check_unit_interval("coeff", coeff)
    _check_plain(model)
    if is_steered(model):
        raise UsageError("the model is already steered: remove the handle of that first")
    # As the ONNX op has them.
    held = torch.tensor(beta, dtype=torch.float32), torch.tensor(coeff, dtype=torch.float32)
    original = type(model)

    def call(self, *args, **kwargs):
        with _Steering(*held):
            return original.__call__(self, *args, **kwargs)

    def refuse(self):
        raise UsageError("TorchScript cannot compile a steered model: use torch.jit.trace")

    body = {"__call__": call, "__prepare_scriptable__": refuse, "__module__": original.__module__}
    model.__class__ = type(original.__name__, (_Steered, original), body)
    return _Handle(model, original)


def is_steered(model):
    """Whether `steer` has changed the model or a part of it."""
    return any(isinstance(module, _Steered) for module in model.modules())


def _check_plain(model):
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
            raise UsageError("the model is compiled: steer it before torch.jit or torch.compile")
        if isinstance(module, nn.DataParallel):
            raise UsageError("DataParallel runs copies of the model: take its `module`")


# --- T-CT


def trainable(model, example_input):
    """Make T-CT of a model: each activation module becomes a CTU with trainable beta and c for each
    channel, starting at the authors' 0.8 and 0.5.

    Channels are dim 1 of 4-D inputs and the last of 2-D and 3-D ones; the pairs are named
    `<module>._raw_beta` and `<module>._raw_coeff` in the state dict, as the authors' are. The paper
    trains only them and a new head: which other parameters to freeze is for the caller to say, here
    their `requires_grad` stays as it is.

    Args:
        model: nn.Module, changed in place, like by `SyncBatchNorm.convert_sync_batchnorm`.
        example_input: a tensor, or a tuple of arguments: it is run once, in eval mode, for sizes.

    Returns:
        The model, or its CTU where it is itself an activation.

    Raises:
        UsageError: there is no activation module, or one is used with different numbers of
            channels or dimensions, or of another number of dimensions than 2, 3 and 4.
    """
    _check_plain(model)
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    shapes, bare = _run_once(model, args)
    if not shapes:
        raise UsageError("no activation module was used: T-CT needs nn.ReLU and the like")
    new = {}
    for module, (name, shape) in shapes.items():
        if len(shape) not in (2, 3, 4):
            raise UsageError(f"{name}: T-CT knows inputs of 2 to 4 dimensions, got {len(shape)}")
        unit = _unit_like(module, shape, shape)
        nn.init.constant_(unit._raw_beta, RAW_BETA)
        nn.init.constant_(unit._raw_coeff, RAW_COEFF)
        new[module] = unit.to(_device(model))
    unused = [n for n, m in model.named_modules() if _is_activation(m) and m not in new]
    if bare or unused:
        warnings.warn(
            f"not trainable: {bare} activations that are function calls, and {len(unused)} modules "
            "that the example did not use",
            stacklevel=2,
        )
    return _replace(model, new)


class _Watch(TorchFunctionMode):
    """Counts the activations that are called while no activation module runs."""

    def __init__(self):
        super().__init__()
        self.inside, self.count = False, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.inside and _read(func, args, kwargs) is not None:
            self.count += 1
        return func(*args, **kwargs)


def _run_once(model, args):
    """Activation module -> (name, shape of its pair), and the number of other activations."""
    shapes, watch = {}, _Watch()

    def note(name):
        def hook(module, inputs):
            watch.inside = True
            shape = [1] * inputs[0].dim()
            channel = 1 if len(shape) >= 4 else -1
            shape[channel] = inputs[0].shape[channel]
            if shapes.setdefault(module, (name, shape))[1] != shape:
                raise UsageError(
                    f"{name} is used with {max(shapes[module][1])} and with {max(shape)} channels: "
                    "give each use a module of its own"
                )

        return hook

    def leave(module, inputs, output):
        watch.inside = False

    training = {module: module.training for module in model.modules()}
    with ExitStack() as undo:
        for module, was in training.items():
            undo.callback(setattr, module, "training", was)
        for name, module in model.named_modules():
            if _is_activation(module):
                for handle in (
                    module.register_forward_pre_hook(note(name or "the model")),
                    module.register_forward_hook(leave),
                ):
                    undo.callback(handle.remove)
        model.eval()
        undo.enter_context(torch.no_grad())
        undo.enter_context(watch)
        model(*args)
    return shapes, watch.count


def _is_activation(module):
    return isinstance(
        module, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.Hardtanh
    )  # ReLU6 is a Hardtanh


def _unit_like(module, beta_shape, coeff_shape):
    """A trainable CTU with the kinks of an activation module."""
    kind = {}
    if isinstance(module, nn.LeakyReLU):
        kind = {"slope": module.negative_slope}
    elif isinstance(module, nn.PReLU):
        kind = {"slope": module.weight}
    elif isinstance(module, nn.Hardtanh):
        kind = {"lower": module.min_val, "upper": module.max_val}
    pair = torch.full(beta_shape, 0.5), torch.full(coeff_shape, 0.5)
    return CTU(*pair, trainable=True, **kind).train(module.training)


def _device(model):
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _replace(model, new):
    """Put the modules of `new`, old -> new, in place of the old ones wherever they are used."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused path of inference has a ReLU inside.
                    parent.activation_relu_or_gelu = 0
    return new.get(model, model)


def restore(model, state_dict):
    """Give an original model the CTUs and all other values of the state dict of a T-CT model.

    Args:
        model: nn.Module, changed in place: as it was before `trainable`, or the authors' code, but
            with the new head.
        state_dict: of the trained model.

    Returns:
        The model, or its CTU where it is itself an activation.

    Raises:
        UsageError: the state dict and the model do not fit.
    """
    _check_plain(model)
    modules, new = dict(model.named_modules(remove_duplicate=False)), {}
    for key, value in state_dict.items():
        path, _, last = f".{key}".rpartition(".")
        path = path[1:]
        if last != "_raw_beta" or isinstance(modules.get(path), CTU):
            continue
        coeff = state_dict.get(f"{path}._raw_coeff" if path else "_raw_coeff")
        if not _is_activation(modules.get(path)):
            raise UsageError(f"the checkpoint has a pair for {path!r}, no activation of the model")
        if coeff is None:
            raise UsageError(f"the checkpoint has a beta for {path!r}, but no coeff")
        new.setdefault(modules[path], _unit_like(modules[path], value.shape, coeff.shape))
    model = _replace(model, new).to(_device(model))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(f"the checkpoint does not fit the model: {' '.join(lines[1:3])}") from None
    return model


def read_checkpoint(path):
    """The state dict in a file; weights only, no code is run.

    Raises:
        ModelError: the file cannot be read, or holds no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception:  # Whatever the reader raises for a damaged file, or one with code in it.
        raise ModelError(
            f"{path}: cannot be read as weights alone: save model.state_dict()"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ModelError(f"{path}: holds no state dict: save model.state_dict()")
    return state


def pairs(state_dict):
    """Module -> {"beta" and "coeff": float32 array} of the CTUs in a state dict.

    Raises:
        UsageError: there is none, or a pair is not complete.
    """
    found = {}
    for key, value in state_dict.items():
        path, _, last = f".{key}".rpartition(".")
        if last in ("_raw_beta", "_raw_coeff"):
            array = torch.sigmoid(value.to(torch.float32)).numpy()
            found.setdefault(path[1:], {})[last.removeprefix("_raw_")] = array
    for path, pair in found.items():
        if len(pair) < 2 or not all(math.prod(array.shape) for array in pair.values()):
            raise UsageError(f"the pair of {path!r} in the checkpoint is not complete")
    if not found:
        raise UsageError("the checkpoint holds no _raw_beta: it is not of a T-CT model")
    return found
