"""T-CT, the trainable version of Curvature Tuning, in PyTorch: of a model, and its state dicts."""

import itertools
import warnings
from contextlib import ExitStack

import torch
from torch import nn

from ..errors import UsageError
from ..rewriting.checkpoint import raw_pairs
from .steering import check_plain, read_call
from .unit import CTU

# Where the authors' code starts training: beta 0.8, c 0.5.
RAW_BETA, RAW_COEFF = 1.386, 0.0


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
    check_plain(model)
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


class _Watch(torch.overrides.TorchFunctionMode):
    """Counts the activations that are called while no activation module runs."""

    def __init__(self):
        super().__init__()
        self.inside, self.count = False, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.inside and read_call(func, args, kwargs) is not None:
            self.count += 1
        return func(*args, **kwargs)


def _run_once(model, args):
    """Activation module -> (name, shape of its pair), and the number of other activations."""
    shapes, watch = {}, _Watch()

    def note(name):
        def hook(module, args, kwargs):
            watch.inside = True
            x = args[0] if args else kwargs["input"]
            shape = [1] * x.dim()
            channel = 1 if len(shape) >= 4 else -1
            shape[channel] = x.shape[channel]
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
                    module.register_forward_pre_hook(note(name or "the model"), with_kwargs=True),
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
    check_plain(model)
    modules, new = dict(model.named_modules(remove_duplicate=False)), {}
    for path, raw in raw_pairs(state_dict).items():
        module = modules.get(path)
        if isinstance(module, CTU):
            continue
        if not _is_activation(module):
            raise UsageError(f"the checkpoint has a pair for {path!r}, no activation of the model")
        new.setdefault(module, _unit_like(module, raw["beta"].shape, raw["coeff"].shape))
    model = _replace(model, new).to(_device(model))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(f"the checkpoint does not fit the model: {' '.join(lines[1:3])}") from None
    return model
