"""`SteeredModel`: what a model says of its activations and their steering, and changing that."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
from onnx import ModelProto, NodeProto

from .. import ctu
from ..errors import NothingToDo, UsageError
from ..model.graph import Scope, check_names, keep, scopes
from ..model.inference import typed_scopes
from .find import Activation, Site, decimal, survey
from .lower import holds_unit
from .parameters import Parameters, add_initializer, fill, make_inputs, scalar, scalar_input
from .records import Metadata, has_record, lowered_op
from .renamed import are_left, give_back_names
from .undo import unsteer

# In the class below `set` is a method.
Names = set[str]

NOT_STEERED = "the model is not steered: `ctonnx patch` steers it"

_LOWERED = "the model holds no CTU, for it was lowered to primitives: go back to its original"
_GONE = (
    "the model holds no CTU, for another tool inlined them, or it was lowered to primitives: go "
    "back to its original"
)
_RENAMED = (
    "another tool renamed the CTUs of several steered models, and their functions differ: "
    "`ctonnx unpatch` it, or steer the original"
)
_CALIBRATED = "the model is calibrated, so its weights are those for its beta: "
_INLINED = "the model was steered, and another tool inlined its CTUs: this may be part of one"


class SteeredModel:
    """A ModelProto and its activations, steered or not. The graph is walked once, when needed.

    `proto` is the model itself, which `set`, `override` and `unsteer` change; after anything else
    that changes it call `forget`. `metadata` is a typed view of its `ctonnx.*` keys.
    CTUs that another tool has renamed get their name back; `renamed` are the names they had.

    Args:
        proto: the ModelProto.
        betas: the names of what holds a beta, where the caller knows and the model does not tell:
            once lowered to primitives it holds no CTU.

    Raises:
        ModelError: names in the model are not UTF-8.
    """

    def __init__(self, proto: ModelProto, betas: Names | None = None):
        self.proto = proto
        check_names(proto, self._scopes)
        self.renamed = give_back_names(proto)
        if self.renamed:  # The scopes are those of before.
            self.forget()
        self.metadata = Metadata(proto)
        self._betas = betas

    @cached_property
    def ctus(self) -> list[NodeProto]:
        """The CTU nodes, without those in the functions of our ops.

        Raises:
            UsageError: another tool has renamed them, and their functions differ.
        """
        if are_left(self.proto):
            raise UsageError(_RENAMED)
        return [n for scope in self._scopes_with_ctus for n in scope.graph.node if ctu.is_ctu(n)]

    @cached_property
    def sites(self) -> list[Site]:
        """The activations in their places, in order of scope and node.

        Raises:
            ModelError: functions share a name, or call each other beyond all bounds.
        """
        parameters = {*self.parameters.betas, *self.parameters.coeffs}
        values = {t.name: decimal(t) for t in self.proto.graph.initializer if t.name in parameters}
        return list(survey(typed_scopes(self.proto, self._scopes), values))

    @cached_property
    def activations(self) -> list[Activation]:
        """The activations as users see them."""
        activations = [site.activation for site in self.sites]
        if not self.ctus:
            baked = self._baked_parameters()
            activations = [replace(a, **baked) if a.status == "steered" else a for a in activations]
        if self._has_inlined():
            # The Relu in the function of a CTU, and the Max in that of a CTUMax, look like any.
            activations = [
                replace(a, status="skipped", reason=_INLINED) if a.status == "steerable" else a
                for a in activations
            ]
        return activations

    @cached_property
    def parameters(self) -> Parameters:
        """What holds beta and c."""
        parameters = Parameters(self.proto, self.ctus, self.metadata.beta_input)
        if self._betas is not None:
            parameters.betas = self._betas
        return parameters

    @cached_property
    def is_steered(self) -> bool:
        """Whether an activation is steered: false where another tool inlined them all."""
        return bool(self.ctus) or any(map(lowered_op, self._nodes()))

    @cached_property
    def was_steered(self) -> bool:
        """Whether the model is steered, or was before another tool or a lowering inlined CTUs."""
        # Other tools drop the metadata of the model or of its nodes.
        return (
            self.metadata.records_steering
            or any(ctu.is_ctu(node) or has_record(node) for node in self._nodes())
            or any(map(holds_unit, self._scopes))
        )

    def check_uncalibrated(self, remedy: str) -> None:
        """Refuse a model that is calibrated.

        Raises:
            UsageError: it is; the message ends in `remedy`.
        """
        if self.metadata.calibration is not None:
            raise UsageError(_CALIBRATED + remedy)

    def set(self, beta: float, coeff: float | None = None, beta_as: str | None = None) -> int:
        """Give all activations one beta, and one c where it is given.

        Args:
            beta, coeff: in [0, 1].
            beta_as: None keeps beta where it is, an optional input with a new default. With
                "initializer" one initializer holds beta afterwards, with "input" one optional
                input, whatever held it before.

        Returns:
            how many initializers and inputs held a beta: several where activations had parameters
            of their own.

        Raises:
            UsageError: beta or c is not in [0, 1]; beta is a required input and is to stay one; or
                the parameters cannot change for all CTUs and nothing else.
            NothingToDo: the model holds no CTU, and no input for beta that may become another.
        """
        beta = ctu.check_unit_interval("beta", beta)
        if coeff is not None:
            coeff = ctu.check_unit_interval("coeff", coeff)
        if beta_as is None:
            self._check_ctus()
        betas, coeffs = self.changeable(coeff is not None)
        if beta_as is None and self.parameters.required:
            raise UsageError(
                "beta is a required input of this model: feed it instead of setting it"
            )
        if beta_as is not None:
            self._unite_betas(beta_as)
        fill(self.proto, betas, beta)
        if coeff is not None:
            self._make_initializers(coeffs)
            fill(self.proto, coeffs, coeff)
        self._record(beta, coeff if coeffs else None)
        self.forget()
        return len(betas)

    def override(self, beta: float) -> dict[str, np.ndarray]:
        """Give every initializer of beta another value, without a word in the metadata.

        Returns:
            what to feed for the betas that are inputs: name -> float32 array without dimensions.

        Raises:
            NothingToDo: nothing holds a beta.
        """
        fill(self.proto, self.betas(), beta)
        feeds = dict.fromkeys(self.parameters.inputs, np.array(beta, np.float32))
        self.forget()
        return feeds

    def require_inputs(self, names: Names) -> None:
        """Make scalar inputs that must be fed of the parameters `names`."""
        make_inputs(self.proto.graph, names)
        self.forget()

    def betas(self) -> Names:
        """The names of the initializers and inputs that hold a beta.

        Raises:
            NothingToDo: nothing does.
        """
        if not self.parameters.betas:
            self._check_ctus()
        return self.parameters.betas

    def changeable(self, coeff: bool = False) -> tuple[Names, Names]:
        """The names of what holds a beta and of what holds a c, once it is sure that they can
        change; none for c after lowering to primitives.

        Args:
            coeff: whether c is to change as well as beta.

        Raises:
            UsageError: what is to change cannot, for all CTUs and nothing else.
            NothingToDo: as `betas`.
        """
        betas = self.betas()
        if self.ctus:
            if not betas:
                raise UsageError("the model's CTUs name no beta: steer its original")
            self.parameters.check_changeable(coeff)
        return betas, self.parameters.coeffs

    def unsteer(self) -> None:
        """Take the steering out of the model, and nothing that other tools did to it since.

        Raises:
            NothingToDo: the model holds no CTU, as after lowering to primitives.
            UsageError: the model is calibrated.
            ModelError: as `undo.unsteer`; the model is unchanged.
        """
        record = self.metadata.calibration
        known = record is None or record.get("original")
        self.check_uncalibrated(
            "name its original, with --original" if known else "its original is not recorded"
        )
        if not are_left(self.proto):
            self._check_ctus()
        unsteer(self.proto)
        self.forget()

    def forget(self) -> None:
        """Drop what was read of the model before it changed."""
        for name, member in vars(type(self)).items():
            if isinstance(member, cached_property):
                self.__dict__.pop(name, None)

    @cached_property
    def _scopes(self) -> list[Scope]:
        return list(scopes(self.proto))

    def _nodes(self) -> Iterator[NodeProto]:
        return (node for scope in self._scopes for node in scope.graph.node)

    @cached_property
    def _scopes_with_ctus(self) -> list[Scope]:
        return [
            scope
            for scope in self._scopes
            if not scope.is_ours and any(map(ctu.is_ctu, scope.graph.node))
        ]

    def _check_ctus(self) -> None:
        if not self.ctus:
            if not self.was_steered:
                raise NothingToDo(NOT_STEERED)
            raise NothingToDo(_LOWERED if any(map(lowered_op, self._nodes())) else _GONE)

    def _has_inlined(self) -> bool:
        """Whether another tool has inlined functions of CTUs."""
        if not self.is_steered:
            return self.was_steered
        return any(map(holds_unit, self._scopes_with_ctus))

    def _baked_parameters(self) -> dict[str, float]:
        """beta and coeff of a model lowered to primitives, as far as the metadata tell."""
        name = self.metadata.beta_input
        fed = name is not None and all(t.name != name for t in self.proto.graph.initializer)
        baked = {"beta": None if fed else self.metadata.beta, "coeff": self.metadata.coeff}
        return {key: value for key, value in baked.items() if value is not None}

    def _unite_betas(self, beta_as: str) -> None:
        """Let one initializer hold beta, an optional input where `beta_as` is "input"."""
        betas = self.parameters.betas
        name = self.metadata.beta_input
        name = name if name in betas else min(betas)
        self.parameters.merge_betas(name)
        graph = self.proto.graph
        keep(graph.initializer, lambda tensor: tensor.name not in betas)
        keep(graph.input, lambda value: value.name not in betas)
        add_initializer(graph, scalar(name, 0.0))
        if beta_as == "input":
            graph.input.append(scalar_input(name))
        self.metadata.update(beta_input=name if beta_as == "input" else None)

    def _make_initializers(self, names: Names) -> None:
        graph = self.proto.graph
        keep(graph.input, lambda value: value.name not in names)
        missing = names - {tensor.name for tensor in graph.initializer}
        for name in sorted(missing):
            add_initializer(graph, scalar(name, 0.0))

    def _record(self, beta: float, coeff: float | None) -> None:
        # Lowered to primitives, activations keep the betas of their own.
        if self.parameters.coeffs or not self.metadata.beta_per_activation:
            self.metadata.update(beta=repr(beta))
        if coeff is not None:
            self.metadata.update(coeff=repr(coeff))
