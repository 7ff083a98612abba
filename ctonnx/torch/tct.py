"""T-CT, the trainable version of Curvature Tuning: `trainable`, and `restore` from a state dict."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from ..rewriting.checkpoint import raw_pairs, spellings
from .calls import read_call
from .steering import check_plain
from .unit import CTU

# Where the authors' code starts training: beta 0.8, c 0.5.
RAW_BETA, RAW_COEFF = 1.386, 0.0


def trainable(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> nn.Module:
    """Turn a model into its T-CT version: each activation module becomes a CTU with a trainable
    beta and c for each channel, which start at the authors' 0.8 and 0.5.

    Channels are dim 1 of 4-D inputs and the last dim of 2-D and 3-D ones. The state dict names the
    pairs `<module>._raw_beta` and `<module>._raw_coeff`, as in the authors' code. The paper trains
    only the pairs and a new head; freeze other parameters yourself, as their `requires_grad` stays
    as it is.

    Args:
        model: nn.Module, changed in place, as by `SyncBatchNorm.convert_sync_batchnorm`.
        example_input: a tensor, or a tuple of arguments. The model runs on it once, in eval mode,
            to learn the numbers of channels.

    Returns:
        The model, or its CTU where it is itself an activation.

    Raises:
        UsageError: there is no activation module, one is used with different numbers of channels
            or dimensions, or an input does not have 2, 3 or 4 dimensions.
    """
    check_plain(model)
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    uses = _run_once(model, args)
    if not uses.shapes:
        raise UsageError("no activation module was used: T-CT needs nn.ReLU and the like")
    units = {}
    for module, shape in uses.shapes.items():
        if len(shape) not in (2, 3, 4):
            raise UsageError(
                f"{uses.names[module]}: T-CT knows inputs of 2 to 4 dimensions, got {len(shape)}"
            )
        unit = _unit_like(module, shape, shape)
        nn.init.constant_(unit._raw_beta, RAW_BETA)
        nn.init.constant_(unit._raw_coeff, RAW_COEFF)
        units[module] = unit.to(_device(model))
    unused = [n for n, m in model.named_modules() if _is_activation(m) and m not in units]
    if uses.function_calls or unused:
        warnings.warn(
            f"not trainable: {uses.function_calls} activations that are function calls, and "
            f"{len(unused)} modules that the example did not use",
            stacklevel=2,
        )
    return _replace(model, units)


def pair_shape(shape: Sequence[int]) -> list[int]:
    """The shape of a beta or c for each channel of a tensor, as in the authors' code: 1 but for
    dim 1 of tensors with 4 dimensions or more, and the last dim of others."""
    pair = [1] * len(shape)
    channel = 1 if len(shape) >= 4 else -1
    pair[channel] = shape[channel]
    return pair


class _Uses(TorchFunctionMode):
    """Records how a model uses activations, while it runs with the hooks of its modules.

    Attributes:
        names: activation module -> its name.
        shapes: activation module -> shape of its pair, 1 but for the channels.
        function_calls: the number of activations outside these modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[nn.Module, str] = {}
        self.shapes: dict[nn.Module, list[int]] = {}
        self.function_calls = 0
        self._in_module = False

    def enter(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Hook before an activation module runs."""
        self._in_module = True
        x = args[0] if args else kwargs["input"]
        shape = pair_shape(x.shape)
        first = self.shapes.setdefault(module, shape)
        if first != shape:
            raise UsageError(
                f"{self.names[module]} is used with {max(first)} and with {max(shape)} channels: "
                "give each use a module of its own"
            )

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Hook after it."""
        self._in_module = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._in_module and read_call(func, args, kwargs) is not None:
            self.function_calls += 1
        return func(*args, **kwargs)


def _run_once(model: nn.Module, args: Sequence[Any]) -> _Uses:
    """Run a model in eval mode, and leave it as it was."""
    uses = _Uses()
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for name, module in model.named_modules():
            if _is_activation(module):
                uses.names[module] = name or "the model"
                before = module.register_forward_pre_hook(uses.enter, with_kwargs=True)
                undo.callback(before.remove)
                after = module.register_forward_hook(uses.leave)
                undo.callback(after.remove)
        model.eval()
        undo.enter_context(torch.no_grad())
        undo.enter_context(uses)
        model(*args)
    return uses


def _is_activation(module: nn.Module | None) -> bool:
    # ReLU6 is a Hardtanh.
    return isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.Hardtanh)


def _unit_like(module: nn.Module, beta_shape: Sequence[int], coeff_shape: Sequence[int]) -> CTU:
    """A trainable CTU with the kinks of an activation module."""
    kinks: dict[str, Any] = {}
    if isinstance(module, nn.LeakyReLU):
        kinks = {"slope": module.negative_slope}
    elif isinstance(module, nn.PReLU):
        kinks = {"slope": module.weight}
    elif isinstance(module, nn.Hardtanh):
        kinks = {"lower": module.min_val, "upper": module.max_val}
    beta, coeff = torch.full(beta_shape, 0.5), torch.full(coeff_shape, 0.5)
    return CTU(beta, coeff, trainable=True, **kinks).train(module.training)


def _device(model: nn.Module) -> torch.device:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _replace(model: nn.Module, units: Mapping[nn.Module, CTU]) -> nn.Module:
    """Put the units in place of the modules that they are keyed by, wherever these are used."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in units:
                parent._modules[name] = units[child]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused path of inference has a ReLU inside.
                    parent.activation_relu_or_gelu = 0
    return units.get(model, model)


def restore(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give an original model the CTUs and all values of the state dict of its T-CT version.

    Args:
        model: nn.Module, changed in place: as it was before `trainable`, or before the authors'
            code, but with the new head.
        state_dict: state dict of the trained model, also of one that DataParallel, torch.compile or
            another module wraps.

    Returns:
        The model, or its CTU where it is itself an activation.

    Raises:
        UsageError: the state dict does not fit the model.
    """
    check_plain(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    state_dict = _unwrapped(state_dict, {*model.state_dict()}, modules)
    units: dict[nn.Module, CTU] = {}
    for path, raw in raw_pairs(state_dict).items():
        module = modules.get(path)
        if isinstance(module, CTU):
            continue
        if module is None or not _is_activation(module):
            raise UsageError(
                f"the checkpoint has a pair for {path!r}, which is no activation of the model"
            )
        units.setdefault(module, _unit_like(module, raw["beta"].shape, raw["coeff"].shape))
    model = _replace(model, units).to(_device(model))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(f"the checkpoint does not fit the model: {' '.join(lines[1:3])}") from None
    return model


def _unwrapped(
    state_dict: Mapping[str, Tensor], names: set[str], modules: Mapping[str, nn.Module]
) -> Mapping[str, Tensor]:
    """The state dict in the spelling that a model of these names knows, if there is one."""
    for spelled in spellings(state_dict.keys()):
        known = (
            name in names or (last.startswith("_raw_") and path in modules)
            for name in spelled.values()
            for path, _, last in [name.rpartition(".")]
        )
        if all(known):
            return {spelled[key]: value for key, value in state_dict.items()}
    return state_dict
