"""What the commands do with a steered model after another tool: every pair, as a page of docs.

    python tests/tools.py --write    # docs/tools.md

`outcomes` gives the cells of the page, and fails where a command neither does what it should nor
refuses: `unpatch` gives what the tool makes of the original, and `set` what it makes of one steered
with that beta.
"""

import importlib.metadata
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import ModelProto

import ctonnx
from ctonnx.check.validate import validate
from ctonnx.errors import CtonnxError
from ctonnx.ort.runs import Model
from ctonnx.rewriting.steered import SteeredModel

PAGE = Path(__file__).parent.parent / "docs" / "tools.md"
COMMANDS = ("inspect", "set", "unpatch", "validate")

# So far apart that a quantized model tells one from the other.
BEFORE, AFTER = 0.2, 0.9

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6] x) => (float[n, 3] y) <float low = {0}, float high = {6}>
    { h = MatMul(x, v)  i = Add(h, b)  r = Relu(i)  j = MatMul(r, w)  c = Clip(j, low, high)
      y = MatMul(c, u) }"""

HEAD = """# Other tools

<!-- Written by tests/tools.py, and checked by tests/test_tools.py. -->

Each row is a tool that changed a steered model, each column a command on what it wrote. *Works*
means:

- `inspect` lists the activations as steered, at their β;
- `set` gives what the tool makes of a model steered with the new β;
- `unpatch` gives what the tool makes of the original, in the numbers that it computes;
- `validate` passes.

Elsewhere the command refuses, and gives the reason. Where a tool leaves no CTU behind, or drops
what `unpatch` needs, run it before you steer.

"""


def original() -> ModelProto:
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in {"v": (6, 8), "b": (8,), "w": (8, 8), "u": (8, 3)}.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


DATA = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)


@dataclass(frozen=True)
class Tool:
    """A tool under test: what it makes of a ModelProto, the package that it needs, and how far its
    results may differ, as a part of the largest value."""

    change: Callable[[ModelProto], ModelProto]
    package: str = "onnx"
    tolerance: float = 1e-5

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package.partition(".")[0]) is not None


def _on_files(change: Callable[[str, str], object]) -> Callable[[ModelProto], ModelProto]:
    """A change of a ModelProto by one from file to file."""

    def changed(model):
        with tempfile.TemporaryDirectory() as folder:
            source, target = f"{folder}/in.onnx", f"{folder}/out.onnx"
            onnx.save(model, source)
            change(source, target)
            return onnx.load(target)

    return changed


def _merge(model):
    before = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "ctonnx" : 1]>
        g (float[n, 6] image) => (float[n, 6] z) <float k = {0.5}> { z = Mul(image, k) }""")
    return onnx.compose.merge_models(before, model, [("z", "x")])


def _float16(**options):
    def change(model):
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

        blocked = [*DEFAULT_OP_BLOCK_LIST, *options.get("blocked", ())]
        return convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)

    return change


def calibration(batches):
    """The CalibrationDataReader of `batches`, dicts from input name to array."""
    from onnxruntime.quantization import CalibrationDataReader

    class Calibration(CalibrationDataReader):
        def __init__(self):
            self._next = iter(batches)

        def get_next(self):
            return next(self._next, None)

    return Calibration()


def _quantize_static(source, target):
    from onnxruntime.quantization import quantize_static

    data = calibration([{"x": DATA}])
    quantize_static(source, target, data, extra_options={"ActivationSymmetric": True})


def _quantize_dynamic(source, target):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def _onnxslim(model):
    import onnxslim

    return onnxslim.slim(model)


def _onnxscript(model):
    import onnxscript.optimizer

    return onnxscript.optimizer.optimize(model)


def _optimised(library):
    def change(source, target):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = target
        if library:
            ctonnx.register(options)
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return _on_files(change)


def _batch(size):
    def change(model):
        from onnx.tools.update_model_dims import update_inputs_outputs_dims

        return update_inputs_outputs_dims(model, {"x": [size, 6]}, {"y": [size, 3]})

    return change


def _graphsurgeon(model):
    import onnx_graphsurgeon as gs

    return gs.export_onnx(gs.import_onnx(model).cleanup())


TOOLS = {
    "`onnx.compose.add_prefix`": Tool(lambda m: onnx.compose.add_prefix(m, "net/")),
    "the same, functions not renamed": Tool(
        lambda m: onnx.compose.add_prefix(m, "net/", rename_functions=False)
    ),
    "`onnx.compose.merge_models`": Tool(_merge),
    "`onnx.inliner`": Tool(lambda m: onnx.inliner.inline_local_functions(m)),
    "`onnx.version_converter`": Tool(lambda m: onnx.version_converter.convert_version(m, 19)),
    "fixed batch": Tool(_batch(32)),
    "another dynamic batch": Tool(_batch("batch")),
    "float16": Tool(_float16(), tolerance=1e-2),
    "float16, CTU blocked": Tool(_float16(blocked=["CTU", "CTUClip"]), tolerance=1e-2),
    "`quantize_static`": Tool(_on_files(_quantize_static), tolerance=0.1),
    "`quantize_dynamic`": Tool(_on_files(_quantize_dynamic)),
    "ONNX Runtime's optimiser": Tool(_optimised(False)),
    "the same, with the op library": Tool(_optimised(True)),
    "onnxslim": Tool(_onnxslim, "onnxslim"),
    "onnxscript's optimizer": Tool(_onnxscript, "onnxscript"),
    "onnx-graphsurgeon": Tool(_graphsurgeon, "onnx_graphsurgeon"),
}


def run(model: ModelProto) -> np.ndarray:
    """The output of a model for DATA, with the op library."""
    (name,) = (value.name for value in model.graph.input)
    (y,) = Model(model.SerializeToString(), library=True).run({name: DATA}).values()
    return y


def outcomes(name: str) -> dict[str, str]:
    """The cells of a tool's row. An AssertionError says what is silently wrong."""
    tool = TOOLS[name]
    steered = tool.change(ctonnx.patch(original(), BEFORE))

    def inspect():
        activations = ctonnx.inspect(steered)
        assert all(a.status != "steerable" for a in activations)
        skipped = [a.reason for a in activations if a.status == "skipped"]
        if skipped:
            return f"lists parts of CTUs: {skipped[0]}"
        betas = {a.beta for a in activations}
        assert len(activations) == 2
        assert betas in ({BEFORE}, {None})
        return "works" if betas == {BEFORE} else "lists CTUs of unknown β"

    def set_():
        copy = ModelProto()
        copy.CopyFrom(steered)
        SteeredModel(copy).set(AFTER)
        return copy, tool.change(ctonnx.patch(original(), AFTER))

    def unpatch():
        return ctonnx.unpatch(steered), tool.change(original())

    def check():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "m.onnx")
            onnx.save(steered, path)
            result = validate(path)
        assert result.ok, [run.outputs for run in result.runs]
        return "works"

    def to_compare(function):
        def compared():
            # What does not run is no result, and no refusal either.
            pair = function()
            try:
                y, expected = map(run, pair)
            except CtonnxError as error:
                raise AssertionError(f"a result that does not run: {error}") from error
            difference = np.abs(y - expected).max() / np.abs(expected).max()
            assert difference <= tool.tolerance, f"differs by {difference}"
            return "works"

        return compared

    checks = inspect, to_compare(set_), to_compare(unpatch), check
    cells = {}
    for command, function in zip(COMMANDS, checks, strict=True):
        try:
            cells[command] = function()
        except CtonnxError as error:
            # What the messages of ONNX Runtime say in detail changes with its release.
            said = str(error)
            cells[command] = said.partition(": ")[0] if command == "validate" else said
    return cells


def row(name: str, cells: dict[str, str]) -> str:
    """The line of the table."""
    return f"| {name} | " + " | ".join(cells[c].replace("|", "\\|") for c in COMMANDS) + " |"


def page(rows: list[str]) -> str:
    """The text of docs/tools.md."""
    table = ["| tool | " + " | ".join(COMMANDS) + " |", "|---" * 5 + "|", *rows]
    return HEAD + "\n".join(table) + "\n"


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    text = page([row(name, outcomes(name)) for name in TOOLS])
    if "--write" in sys.argv:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
