"""Steered models in torch.fx."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..errors import UsageError
from . import calls, fused

# The functions that steering reaches, and what they are called.
NAMES: dict[Callable, str] = {func: spelling.name for func, spelling in calls.SPELLINGS.items()}
NAMES |= {func: name for func, (name, _) in fused.FUSED.items()}
FUNCTIONS = {name: func for func, name in NAMES.items()}

# Modules that a tracer takes for leaves, though they only call an activation function.
_ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,  # and nn.ReLU6
    nn.Hardsigmoid,
    nn.Threshold,
)


def proxy_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Proxy | None:
    """The first argument that stands for a value while torch.fx traces; None where none does."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)


@contextmanager
def into_activations(tracer: Any) -> Iterator[None]:
    """Let a tracer trace what activation modules call.

    Raises:
        UsageError: a leaf of the graph hides other activations.
    """
    is_leaf = tracer.is_leaf_module

    def is_other_leaf(module: nn.Module, name: str) -> bool:
        if isinstance(module, _ACTIVATIONS) or not is_leaf(module, name):
            return False
        if any(_may_hide_one(part) for part in module.modules()):
            raise UsageError(
                f"torch.fx cannot trace {name}, a {type(module).__name__}, in a steered model: "
                "trace the model first, and steer the graph"
            )
        return True

    tracer.is_leaf_module = is_other_leaf
    try:
        yield
    finally:
        tracer.is_leaf_module = is_leaf


def redirect_activations(graph: fx.Graph, target: Callable, parameters: Sequence[float]) -> None:
    """Let the nodes of a graph that call activations call `target` with the function's name, these
    parameters and the arguments."""
    for node in graph.nodes:
        name = f"Tensor.{node.target}" if node.op == "call_method" else NAMES.get(node.target)
        if node.op in ("call_method", "call_function") and name in FUNCTIONS:
            node.op, node.target = "call_function", target
            node.args = (name, *parameters, *node.args)


def _may_hide_one(module: nn.Module) -> bool:
    is_relu = getattr(module, "mode", None) == "RNN_RELU" or (
        getattr(module, "nonlinearity", None) == "relu"
    )
    transformer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    name = type(module).__name__
    return is_relu or transformer or isinstance(module, _ACTIVATIONS) or "ReLU" in name
