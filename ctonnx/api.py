"""The public functions on models: a path, a ModelProto or a graphsurgeon Graph goes in and out."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from .calibration.calibrate import check_calibration, set_calibrated, steer_calibrated
from .errors import UsageError
from .model import files
from .rewriting.find import Activation
from .rewriting.params import read as read_params
from .rewriting.steer import Selection
from .rewriting.steered import SteeredModel


def patch(
    model: Any,
    beta: float | None = None,
    coeff: float = 0.5,
    *,
    params: str | Path | Mapping | None = None,
    by_order: bool = False,
    output: str | Path | None = None,
    beta_as: str = "initializer",
    lowering: str = "portable",
    ops: Iterable[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    calibration: Any = None,
    force: bool = False,
) -> Any:
    """Replace the piecewise-affine activations of a model by CT units.

    Args:
        model: a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph. It is not changed.
        beta: the curvature, in [0, 1]; 1 is the original network, smaller is smoother.
        coeff: the paper's c, in [0, 1]: how the two smooth versions of ReLU are mixed.
        params: (beta, c) of single activations: a path to a .json, .npz or .pth file, or a dict
            from an activation's name, or a regular expression, to beta or {"beta": ...,
            "coeff": ...}; each a number, or one per channel. Without `beta` only those activations
            are steered.
        by_order: assign the pairs of a T-CT state dict (.pth) in order, not by name.
        output: for a path, where to write; `x.ct.onnx` beside `x.onnx` where None.
        beta_as: "initializer" bakes beta in; "input" makes it an optional graph input with that
            value as default; "required-input" a graph input that must be fed.
        lowering: "portable" (CTU nodes, and a function of standard ops for runtimes without the op
            library), "op" (the nodes alone) or "primitives" (standard ops alone).
        ops: iterable of op types to steer, in any case; all supported ones where None.
        include, exclude: regular expressions searched in the activations' names.
        calibration: unlabelled data, as the dataset of `ctonnx.sweep`, or a ctonnx.Calibration of
            them: the linear layers behind steered activations get back the mean and variance per
            channel that they have on these in the original.
        force: overwrite `output`.

    Returns:
        The steered model, of the kind of `model`; for a path, the Path written. `inspect` tells
        what is steered and what is skipped, and why.

    Raises:
        UsageError: a wrong argument, an existing output, a model that is steered already, a
            graphsurgeon Graph with `beta_as="input"`, as these know no optional inputs; or
            calibration data that do not fit the model.
        InputFileError: calibration data, or parameters, cannot be read.
        NothingToDo: no activation to steer.
        ModelError: the model cannot be read, or is unsafe to read.
    """
    if isinstance(params, str | Path):
        values = read_params(params, by_order)
    elif by_order:
        raise UsageError("by_order goes with the path of a T-CT state dict as params")
    else:
        values = params
    if beta_as == "input" and _is_graph(model):
        raise UsageError("a graphsurgeon Graph has no optional inputs: use required-input")

    samples = None if calibration is None else check_calibration(calibration, beta_as)

    def change(proto: ModelProto, origin: Callable[[], files.Origin]) -> None:
        steer_calibrated(
            proto,
            samples,
            files.Origin() if samples is None else origin(),
            beta=beta,
            coeff=coeff,
            params=values,
            beta_as=beta_as,
            lowering=lowering,
            selection=Selection(ops, include, exclude),
        )

    return _edit(model, change, output, steered_path, force)


def inspect(model: Any) -> list[Activation]:
    """The activations of a model: a list of Activation, in graph order.

    Args:
        model: a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph.

    Raises:
        ModelError: the model cannot be read.
    """
    return SteeredModel(_to_proto(model)).activations


def set(
    model: Any,
    beta: float,
    coeff: float | None = None,
    *,
    calibration: Any = None,
    output: str | Path | None = None,
    force: bool = False,
) -> Any:
    """Give all activations of a steered model another β, and another c where it is given.

    Args:
        model: a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph. It is not changed, but for
            a path without `output`.
        beta, coeff: in [0, 1].
        calibration: as for `patch`. A calibrated model needs it, and gets the statistics back that
            it has on these data.
        output: for a path, where to write; the path itself where None.
        force: overwrite `output`.

    Returns:
        The model with that β, of the kind of `model`; for a path, the Path written.

    Raises:
        UsageError: a wrong argument, an existing output; the model is calibrated and there is no
            `calibration`; β is an input that must be fed, or cannot change for all activations and
            nothing else; or calibration data that do not fit the model.
        NothingToDo: the model is not steered.
        InputFileError: calibration data cannot be read.
        ModelError: the model cannot be read.
    """
    samples = None if calibration is None else check_calibration(calibration)

    def change(proto: ModelProto, origin: Callable[[], files.Origin]) -> None:
        set_calibrated(SteeredModel(proto), samples, origin, beta, coeff)

    return _edit(model, change, output, lambda path: path, force or output is None)


def unpatch(
    model: Any,
    output: str | Path | None = None,
    *,
    original: str | Path | None = None,
    force: bool = False,
) -> Any:
    """Give back the original of a steered model, with what other tools did to that since.

    Args:
        model: a path or an onnx.ModelProto. It is not changed. (A graphsurgeon Graph has no
            metadata that tell what its CTUs replaced.)
        original: the path of the original of a calibrated model, whose weights have changed: what
            is given back are its bytes, once it is sure that it is the original.
        output: for a path, where to write; `x.onnx` for `x.ct.onnx` where None.
        force: overwrite `output`.

    Returns:
        The original, of the kind of `model`; for a path, the Path written.

    Raises:
        UsageError: an existing output, or a path that suggests none; the model is calibrated and
            there is no `original`, or that is not its original.
        NothingToDo: the model is not steered.
        ModelError: the model cannot be read, its record of the original is missing or damaged, or
            other tools have changed it so that the original cannot be had.
    """
    if original is None:
        return _edit(model, _unsteer, output, original_path, force)
    wanted = _recorded_original(model)
    if not isinstance(model, (str, Path)):
        _check_original(original, files.origin(original).digest, wanted)
        return files.load(original)
    with files.Transaction(original, output or original_path(model), force) as edit:
        _check_original(original, edit.origin().digest, wanted)
        edit.copies_file = True
    return edit.output


def _unsteer(proto: ModelProto, _: Any) -> None:
    SteeredModel(proto).unsteer()


def _recorded_original(model: Any) -> str:
    """The digest of the original of a calibrated model."""
    record = SteeredModel(_to_proto(model)).metadata.calibration
    if record is None:
        raise UsageError("the model is not calibrated: leave out original")
    digest = record.get("original")
    if not isinstance(digest, str):
        raise UsageError("the model's record names no original: it cannot be undone")
    return digest


def _check_original(path: str | Path, digest: str | None, wanted: str) -> None:
    if digest != wanted:
        raise UsageError(f"{path}: is not the original of the model: their digests differ")


def steered_path(model: str | Path) -> str | Path:
    """The default output of `patch`: `x.ct.onnx` beside `x.onnx`, and `-` for `-`."""
    if model == files.STDIO:
        return model
    model = Path(model)
    return model.with_name(f"{model.stem if model.suffix == '.onnx' else model.name}.ct.onnx")


def original_path(model: str | Path) -> str | Path:
    """The default output of `unpatch`: `x.onnx` beside `x.ct.onnx`, and `-` for `-`."""
    if model == files.STDIO:
        return model
    model = Path(model)
    if not model.name.endswith(".ct.onnx"):
        raise UsageError(f"{model}: does not end in .ct.onnx: name the output with -o")
    return model.with_name(model.name.removesuffix(".ct.onnx") + ".onnx")


def _edit(
    model: Any,
    change: Callable[[ModelProto, Callable[[], files.Origin]], None],
    output: str | Path | None,
    default_output: Callable[[str | Path], str | Path],
    force: bool,
) -> Any:
    """Apply `change` to a copy of `model`, and return that in the kind of `model`.

    Args:
        change: called with the copy, and a function that gives where the model comes from.
    """
    if isinstance(model, (str, Path)):
        with files.Transaction(model, output or default_output, force) as edit:
            change(edit.model, edit.origin)
        return edit.output
    if output is not None:
        raise UsageError("output goes with a path: save the model that is returned instead")
    proto = _to_proto(model)
    change(proto, lambda: files.Origin(files.digest(proto)))
    if isinstance(model, ModelProto):
        return proto
    import onnx_graphsurgeon

    return onnx_graphsurgeon.import_onnx(proto)


def _to_proto(model: Any) -> ModelProto:
    """A ModelProto that may be changed."""
    if isinstance(model, (str, Path)):
        return files.load(model)
    if isinstance(model, ModelProto):
        proto = ModelProto()
        proto.CopyFrom(model)
        return proto
    if _is_graph(model):
        import onnx_graphsurgeon

        return onnx_graphsurgeon.export_onnx(model)
    raise UsageError(
        f"expected a path, a ModelProto or a graphsurgeon Graph, got {type(model).__name__}"
    )


def _is_graph(model: Any) -> bool:
    return type(model).__module__.startswith("onnx_graphsurgeon")
