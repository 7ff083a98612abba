"""Running a network up to its head, and reading the features there."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import ModelProto

from ..data.batches import Batch
from ..data.source import Source
from ..errors import CtonnxError, InputFileError, UsageError
from ..measure import engine
from ..model import files, flow
from ..rewriting.steered import SteeredModel
from .fit import Label, batch_labels
from .heads import HeadSite, find_head

# The most bytes of features in memory at once: they bound how many β are read together.
_MAX_BYTES = 2 << 30


@dataclass
class FeatureSet:
    """What was read of a data set.

    `features` has an array (samples, width) for each β, and `labels` a label for each sample.
    `shape` and `dtype` are those of one sample's features before they are flattened. `broken`
    counts the samples that cannot be read.
    """

    features: list[np.ndarray]
    labels: list[Label]
    shape: tuple[int, ...]
    dtype: np.dtype
    broken: int


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features in front of a head.

    `original` runs the network without steering, `steered` at any β and with `coeff`, or the
    default where that is None. `notes` are lines that a user should see.
    """

    site: HeadSite
    original: engine.Runner
    steered: engine.Runner
    coeff: float | None
    notes: list[str]

    def read_original(self, source: Source) -> FeatureSet:
        """The features of a source's samples in the original network, as at β = 1.

        Raises:
            UsageError: labels are missing or wrong, or the features are not the same number of
                finite floating-point numbers for every sample.
            InputFileError: no sample can be read.
        """
        return _read(self.original, source, self.site, [(1.0, self.coeff)])

    def read_steered(self, source: Source, betas: Sequence[float]) -> FeatureSet:
        """The features of a source's samples at each β.

        Raises:
            UsageError, InputFileError: as `read_original`.
        """
        return _read(self.steered, source, self.site, [(beta, self.coeff) for beta in betas])


def open_reader(
    model: str | Path | ModelProto,
    steerable: engine.Steerable,
    features: str | None = None,
    coeff: float | None = None,
    providers: Sequence | None = None,
) -> FeatureReader:
    """Open the sessions that give a model's features.

    Args:
        model: what `steerable` was made of.
        features: the name of their tensor; the input of the last linear layer where None.

    Raises:
        UsageError: there is no linear layer or no such tensor, or steering does not change it.
        ModelError: ONNX Runtime does not load the model.
    """
    proto, notes = ModelProto.FromString(steerable.data), []
    names = steerable.measurable if steerable.chosen is None else [steerable.chosen]
    site = find_head(proto, names, features)
    if len(names) > 1:
        notes.append(f"the new head makes the output {site.output!r}, as the old one did")
        notes.append(f"of the outputs {', '.join(names)} --output-name chooses another")
    if site.features not in flow.Flow(proto.graph).reached_from(steerable.betas):
        raise UsageError(
            f"no steered activation is in front of the features {site.features!r}: beta changes "
            "nothing there"
        )
    steered = _steered_runner(proto, steerable, site, providers)
    network = _without_steering(model)
    if network is None:
        notes.append("beta 1 is measured through the CT units: the original is not known")
        return FeatureReader(site, steered, steered, coeff, notes)
    if site.features not in flow.Flow(network.graph).producer:
        raise UsageError(
            f"the features {site.features!r} exist in the steered model only: name a tensor that "
            "the original has too"
        )
    part = _part(steerable, flow.cut(network, [site.features]), steered=False)
    return FeatureReader(site, engine.Runner(part, providers), steered, coeff, notes)


def _steered_runner(
    proto: ModelProto, steerable: engine.Steerable, site: HeadSite, providers: Sequence | None
) -> engine.Runner:
    """A Runner up to the features, which runs what does not depend on β once for all β."""
    parts = flow.split(proto, site.features, set(steerable.parameters))
    if parts is None:
        whole = flow.cut(proto, [site.features])
        return engine.Runner(_part(steerable, whole, steered=True), providers)
    shared, rest = parts
    return engine.Runner(
        _part(steerable, rest, steered=True),
        providers,
        shared=_part(steerable, shared, steered=False),
    )


def _part(steerable: engine.Steerable, model: ModelProto, *, steered: bool) -> engine.Steerable:
    """The Steerable of `model`, a part of the network: without β and c where it is not steered."""
    outputs = [value.name for value in model.graph.output]
    part = replace(
        steerable,
        data=model.SerializeToString(deterministic=True),
        outputs=outputs,
        measurable=outputs,
        chosen=None,
    )
    return part if steered else replace(part, betas=[], coeffs=[], corrections={})


def _without_steering(model: str | Path | ModelProto) -> ModelProto | None:
    """A copy of the model without steering; None where its original is not known."""
    original = files.own(model)
    try:
        model_before = SteeredModel(original)
        if model_before.is_steered:
            model_before.unsteer()
    except CtonnxError:  # It is lowered to primitives, or another tool removed the record.
        return None
    return original


def batches(source: Source) -> Iterator[Batch]:
    """All batches of a source, the next one prepared while one is used."""
    for _, batch in engine.prefetch(source, zip(itertools.count())):
        yield batch


def _read(
    runner: engine.Runner, source, site: HeadSite, points: Sequence[tuple[float, float | None]]
) -> FeatureSet:
    """Read the features at each point (β, c)."""
    arrays: list[list[np.ndarray]] = [[] for _ in points]
    labels, broken, formats = [], 0, set()
    for batch in batches(source):
        broken += batch.broken
        if not len(batch):
            continue
        labels += batch_labels(batch.labels, source)
        outputs = runner.outputs(batch, points, [site.features])
        for of_point, (beta, _), output in zip(arrays, points, outputs, strict=True):
            array = output[site.features]
            formats.add((array.shape[1:], array.dtype))
            _check_features(array, formats, site, beta)
            of_point.append(array.reshape(len(array), -1))
    if not labels:
        raise InputFileError("the data hold no sample that can be read")
    features = []
    while arrays:  # One at a time: while it is joined, its features are in memory twice.
        features.append(np.concatenate(arrays.pop(0)))
    shape, dtype = formats.pop()
    return FeatureSet(features, labels, shape, dtype, broken)


def _check_features(array: np.ndarray, formats: set, site: HeadSite, beta: float) -> None:
    what = f"the features {site.features!r} are {array.dtype}{list(array.shape)}"
    if array.ndim < 2 or array.dtype.kind != "f" or len(formats) > 1:
        raise UsageError(
            f"{what}: expected the same number of floating-point numbers for every sample"
        )
    if not site.chosen_by_user and sum(size > 1 for size in array.shape[1:]) > 1:
        raise UsageError(
            f"{what}: the linear layer is applied to a sequence or a map; name a tensor with "
            "--features"
        )
    if not np.isfinite(array).all():
        raise UsageError(f"the features {site.features!r} hold NaN or infinity at beta {beta:g}")


def groups_of(betas: Sequence[float], sets: Sequence[FeatureSet]) -> list[Sequence[float]]:
    """The β in groups whose features fit in memory at once.

    Args:
        sets: what was read of all data sets at one β.
    """
    size = sum(each.features[0].nbytes for each in sets)
    count = max(1, _MAX_BYTES // max(size, 1))
    return [betas[i : i + count] for i in range(0, len(betas), count)]
