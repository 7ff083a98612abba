"""Running the networks and reading their features."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from ..errors import CtonnxError, InputFileError, UsageError
from ..measure import engine
from ..model import files, flow
from ..rewriting import rewrite
from . import heads
from .fit import _labels

# The features of so many β are held at once.
_MOST_BYTES = 2 << 30


def _runners(model, steerable, features, providers):
    """The Head, and Runners that give its features: of the original network and at any β."""
    proto = ModelProto.FromString(steerable.data)
    head = heads.find(proto, steerable.measurable, features)
    if head.output != steerable.output:
        steerable.notes.append(f"the new head makes the output {head.output!r}, as the old one did")
    if head.features not in flow.Flow(proto.graph).reached_from(steerable.betas):
        raise UsageError(
            f"no steered activation is in front of the features {head.features!r}: beta changes "
            "nothing there"
        )

    def runner(part, before=None, **changed):
        return engine.Runner(_part(steerable, part, **changed), providers, shared=before)

    fixed = {"betas": [], "coeffs": []}
    parts = flow.split(proto, head.features, {*steerable.betas, *steerable.coeffs})
    if parts is None:
        steered = runner(flow.cut(proto, [head.features]))
    else:
        steered = runner(parts[1], _part(steerable, parts[0], **fixed))
    original = files.own(model)
    try:
        if rewrite.holds_steered(original):
            rewrite.unsteer(original)
    except CtonnxError:  # It is lowered to primitives, or another tool took the record out.
        steerable.notes.append("beta 1 is measured through the CT units: the original is not known")
        return head, steered, steered
    if head.features not in flow.Flow(original.graph).producer:
        raise UsageError(
            f"steering has made the features {head.features!r}: name a tensor that the original "
            "has too"
        )
    return head, runner(flow.cut(original, [head.features]), **fixed), steered


def _part(steerable, part, **changed):
    """The Steerable of a part of its model."""
    outputs = [value.name for value in part.graph.output]
    data_of = part.SerializeToString(deterministic=True)
    return replace(steerable, data=data_of, outputs=outputs, measurable=outputs, **changed)


@dataclass
class _Set:
    """What was read of a data set: for each point an array (samples, features); the labels as a
    list of int and str; the shape of a sample's features, their dtype, and the unreadable."""

    features: list
    labels: list
    shape: tuple
    dtype: np.dtype
    broken: int


def _read(runner, source, head, points):
    rows, labels, broken, kinds = [[] for _ in points], [], 0, set()
    for _, batch in engine.ahead(source, zip(itertools.count())):
        broken += batch.broken
        if not len(batch):
            continue
        labels += _labels(batch.labels, source)
        outputs = runner.outputs(batch, points, [head.features])
        for held, (beta, _), output in zip(rows, points, outputs, strict=True):
            value = output[head.features]
            kinds.add((value.shape[1:], value.dtype))
            _check_features(value, kinds, head, beta)
            held.append(value.reshape(len(value), -1))
    if not labels:
        raise InputFileError("the data hold no sample that can be read")
    features = []
    while rows:  # One by one, for each is in memory twice meanwhile.
        features.append(np.concatenate(rows.pop(0)))
    return _Set(features, labels, *kinds.pop(), broken)


def _check_features(value, kinds, head, beta):
    what = f"the features {head.features!r} are {value.dtype}{list(value.shape)}"
    if value.ndim < 2 or value.dtype.kind != "f" or len(kinds) > 1:
        raise UsageError(f"{what}: expected as many floating-point numbers for every sample")
    if not head.named and sum(size > 1 for size in value.shape[1:]) > 1:
        raise UsageError(
            f"{what}: the linear layer found is one of a sequence or a map: name a tensor with "
            "--features"
        )
    if not np.isfinite(value).all():
        raise UsageError(f"the features {head.features!r} hold NaN or infinity at beta {beta:g}")


def _groups(betas, sets):
    """Lists of β whose features are held at once; β = 1 comes first, and is read already."""
    size = sum(given.features[0].nbytes for given in sets)
    count = max(1, _MOST_BYTES // max(size, 1))
    rest = [beta for beta in betas if beta != 1.0]
    return [[1.0], *(rest[i : i + count] for i in range(0, len(rest), count))]
