"""The differentiable run: onnx's evaluator carries PyTorch's tensors from trained ones to outputs.

Floating-point values are tensors, of one type on one device; all others are NumPy arrays. An op in
`GRADIENTS` computes on tensors. Any other op runs as in the reference run, in float64 on the CPU,
and none of these lies between a trained tensor and an output.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto
from onnx.reference.op_run import OpRun
from torch import Tensor

from .. import ctu
from ..check.ops.base import TorchOp
from ..check.reference import REMEDY, Evaluator, op_name, prepare
from ..errors import ModelError, UsageError, first_line
from ..model.flow import Flow
from ..model.graph import node_label
from ..rewriting.parameters import BETA_SLOT
from .ops import CUTTING, GRADIENTS


class Network:
    """A model to train some tensors of.

    Args:
        model: a ModelProto with its data, which stays as it is.
        outputs: the names of the outputs to compute.
        trained: the names of initializers that `run` is given as tensors.
        device: where to run.
        dtype: torch.float32, or torch.float64 to check gradients.
        adapt: whether BatchNormalization uses the batch's statistics in training, and updates its
            own, as PyTorch does.

    Raises:
        ModelError: the evaluator cannot take the model.
        UsageError: an op between a trained tensor and an output has no gradient, no trained tensor
            reaches an output, or no BatchNormalization can adapt.

    Attributes:
        reaching: those of `trained` that an output depends on.
        shapes: initializer of β -> the shapes of the tensors that it bent.
        statistics: output of a BatchNormalization that adapts -> its mean and variance.
    """

    def __init__(
        self,
        model: ModelProto,
        outputs: Sequence[str],
        trained: Collection[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        adapt: bool = False,
    ) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self.outputs = list(outputs)
        try:
            proto = prepare(model)
            self._check_path(proto, set(trained))
            self._evaluator = Evaluator(proto)
        except ModelError as error:
            raise ModelError(str(error).removesuffix(f": {REMEDY}")) from error
        values = self._evaluator.rt_inits_
        for name in values.keys() & set(trained):
            values[name] = None
        values.update({name: self._kept(value) for name, value in values.items()})
        self._adapt, self._training = adapt, False
        self._normalizations: list[TorchOp] = []
        self.shapes: dict[str, set[tuple[int, ...]]] = {}
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        for node in self._evaluator.rt_nodes_:
            self._make_differentiable(node)
        if adapt and not self._normalizations:
            raise UsageError(
                "the model holds no BatchNormalization that could adapt: exporters fold them into "
                "convolutions; export it with them, or leave batch norm frozen"
            )
        self._evaluator.rt_nodes_[:] = list(self._with_forgetting(Flow(proto.graph)))

    def _check_path(self, proto: ModelProto, trained: set[str]) -> None:
        flow, reached = Flow(proto.graph), set(trained)
        needed = flow.needed_for(self.outputs)
        for i in needed:
            node = flow.nodes[i]
            if reached.isdisjoint(flow.reads[i]) or _cuts(node):
                continue
            if (node.domain, node.op_type) not in GRADIENTS:
                raise UsageError(
                    f"{op_name(node)} {node_label(node)!r} has no gradient here, and lies between "
                    f"what is trained and the output {self.outputs[0]!r}: leave out the "
                    "activations before it, with --include or --exclude"
                )
            reached.update(filter(None, node.output))
        self.reaching = self._reaching(flow, needed, trained)
        if trained and reached.isdisjoint(self.outputs):
            raise UsageError(
                f"no steered activation is in front of the output {self.outputs[0]!r}: training "
                "would change nothing there"
            )

    def _reaching(self, flow: Flow, needed: list[int], trained: set[str]) -> set[str]:
        """Those of `trained` that an output depends on."""
        wanted = set(self.outputs)
        for i in reversed(needed):
            if not wanted.isdisjoint(flow.nodes[i].output) and not _cuts(flow.nodes[i]):
                wanted |= flow.reads[i]
        return wanted & trained

    def _kept(self, value: Any) -> Any:
        """An array as the run keeps it: floating-point ones as tensors."""
        if isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.floating):
            array = np.require(value, requirements=["C", "W"])
            return torch.from_numpy(array).to(self._device, self._dtype)
        return value

    def _make_differentiable(self, node: OpRun) -> None:
        named: Any = node.run
        plain = named.args[0]  # without the name that the reference run gives to failures
        make = GRADIENTS.get((node.onnx_node.domain, node.onnx_node.op_type))
        run: Callable[..., Any] = partial(self._run_detached, plain)
        if make is not None and (node.onnx_node.op_type != "Cast" or not _cuts(node.onnx_node)):
            own = make(node.onnx_node, node.run_params)
            attributes = {name: getattr(own, name) for name in own.attributes_names_}
            run = partial(self._run_on_tensors, own, attributes, run)
            if self._adapt and node.onnx_node.op_type == "BatchNormalization":
                self._normalizations.append(own)
        node.run = partial(_named, run, node.onnx_node)

    def _run_on_tensors(
        self,
        own: TorchOp,
        attributes: Mapping[str, Any],
        otherwise: Callable[..., Any],
        *inputs: Any,
        **options: Any,
    ) -> tuple[Any, ...]:
        if not any(isinstance(value, Tensor) for value in inputs):
            return otherwise(*inputs, **options)
        tensors = [self._tensor(value) for value in inputs]
        if own in self._normalizations:
            name = own.output[0]
            if name not in self.statistics:
                mean, variance = (tensor.clone() for tensor in tensors[3:5] if tensor is not None)
                self.statistics[name] = mean, variance
            tensors[3:5] = self.statistics[name]
            attributes = {**attributes, "adapts": self._training}
        if own.op_domain == ctu.DOMAIN:
            self.shapes.setdefault(own.input[BETA_SLOT], set()).add(tuple(inputs[0].shape))
        return tuple(map(_kept_output, own.compute(tensors, attributes)))

    def _tensor(self, value: Any) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return value
        return torch.from_numpy(np.require(value, requirements=["C", "W"])).to(self._device)

    def _run_detached(self, plain: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if "context" in options:
            options["context"] = {k: _detached(v) for k, v in options["context"].items()}
        with np.errstate(all="ignore"):
            outputs = plain(*map(_detached, inputs), **options)
        return tuple(map(self._kept, outputs))

    def _with_forgetting(self, flow: Flow) -> Iterator[Any]:
        """The nodes, and behind each a pseudo-node that drops what no later node reads."""
        last: dict[str, int] = {}
        for i, names in enumerate(flow.reads):
            last.update(dict.fromkeys((*names, *flow.nodes[i].output), i))
        dead: dict[int, list[str]] = {}
        kept = {"", *self.outputs}
        for name, i in last.items():
            if name in flow.producer and name not in kept:
                dead.setdefault(i, []).append(name)
        for i, node in enumerate(self._evaluator.rt_nodes_):
            yield node
            if i in dead:
                yield _Forget(dead[i])

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        trained: Mapping[str, Tensor],
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Run the model.

        Args:
            inputs: input name -> array.
            trained: the trained tensors by name.
            training: whether batch norm that adapts uses the batch's statistics.

        Returns:
            output name -> tensor, with a gradient to the trained ones.

        Raises:
            ModelError: an op fails.
        """
        self._training = training
        feeds = {name: self._kept(_as_float(value)) for name, value in inputs.items()}
        # So that the bodies of ops make their tensors there.
        with nullcontext() if self._device.type == "cpu" else self._device:
            values = self._evaluator.run(self.outputs, {**feeds, **trained})
        outputs = {}
        for name, value in zip(self.outputs, values, strict=True):
            if not isinstance(value, Tensor):
                raise UsageError(f"output {name!r} holds no floating-point numbers")
            outputs[name] = value
        return outputs


class _Forget:
    """A pseudo-node of the evaluator that replaces tensors by None, so that they are freed."""

    op_type, input, has_linked_attribute = "", (), False

    def __init__(self, names: Sequence[str]) -> None:
        self.output = names

    def need_context(self) -> bool:
        return False

    def run(self) -> tuple[None, ...]:
        return (None,) * len(self.output)


def _named(run: Callable[..., Any], node: NodeProto, *inputs: Any, **options: Any) -> Any:
    """Run a node; a message of what fails in it names it."""
    try:
        return run(*inputs, **options)
    except (ModelError, UsageError, MemoryError):
        raise
    except Exception as error:  # The evaluator, NumPy and PyTorch raise many types.
        where = f"{op_name(node)} {node_label(node)!r}"
        raise ModelError(f"the run failed at {where}: {first_line(error)}") from error


def _cuts(node: NodeProto) -> bool:
    """Whether what a node gives are sizes, conditions or whole numbers, which pass no gradient."""
    if node.domain:
        return False
    if node.op_type == "Cast":
        return all(a.name != "to" or a.i not in ctu.FLOATING for a in node.attribute)
    return node.op_type in CUTTING


def _kept_output(value: Tensor) -> Any:
    return value if value.is_floating_point() else value.cpu().numpy()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    return value


def _as_float(value: np.ndarray) -> np.ndarray:
    """An array in a type that PyTorch knows."""
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value
