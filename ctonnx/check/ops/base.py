"""Registering ops for onnx's ReferenceEvaluator: PyTorch functions, and classes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from onnx import NodeProto, defs
from onnx.reference.op_run import OpRun
from torch import Tensor

# All registered ops. The evaluator finds them by class name and `op_domain`.
OPS: list[type[OpRun]] = []


class VersionedOp(OpRun):
    """An op whose attributes default as in the model's own opset, `version`.

    OpRun alone uses the defaults of the newest opset.
    """

    def __init__(self, node: NodeProto, run_params: dict[str, Any]) -> None:
        self.version: int = run_params["opsets"][node.domain]
        standard = not node.domain and defs.has(node.op_type)
        schema = defs.get_schema(node.op_type, self.version, "") if standard else None
        super().__init__(node, run_params, schema)


class TorchOp(VersionedOp):
    """An op computed by `body`, a method: it takes tensors, and attributes as keywords.

    Floating-point tensors are float64. `body` returns a tensor, or a tuple of several.
    """

    body: ClassVar[Callable[..., Any]]

    def _run(self, *inputs: np.ndarray | None, **attributes: Any) -> tuple[np.ndarray, ...]:
        outputs = self.compute(map(_tensor, inputs), attributes)
        return tuple(tensor.numpy() for tensor in outputs)

    def compute(
        self, inputs: Iterable[Tensor | None], attributes: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """The outputs of the node."""
        if self.op_domain:  # The others are defaults of a standard op of the same name.
            own = {attribute.name for attribute in self.onnx_node.attribute}
            attributes = {k: v for k, v in attributes.items() if k in own}
        # A NumPy float32 attribute would turn what is computed with it into float32.
        exact = {k: float(v) if isinstance(v, np.floating) else v for k, v in attributes.items()}
        outputs = self.body(*inputs, **exact)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def op(
    *op_types: str, domain: str = "", registry: list[type[OpRun]] = OPS
) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as the `body` of a TorchOp for each op type."""

    def register(body):
        members = {"op_domain": domain, "body": body}
        registry.extend(type(op_type, (TorchOp,), members) for op_type in op_types)
        return body

    return register


def op_class(*op_types: str, domain: str = "") -> Callable[[type[OpRun]], type[OpRun]]:
    """Decorator that registers a subclass of an OpRun for each op type."""

    def register(base):
        OPS.extend(type(op_type, (base,), {"op_domain": domain}) for op_type in op_types)
        return base

    return register


def _tensor(array: np.ndarray | None) -> Tensor | None:
    if array is None:
        return None
    dtype = np.float64 if np.issubdtype(array.dtype, np.floating) else array.dtype
    # PyTorch accepts no negative strides, and warns about read-only arrays.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))
