"""One runtime in its own process, started by `run.py`.

For each run of a model, it reads a job from standard input and writes an answer to standard output,
each a line of JSON.

A job is {"model": path, "inputs": tensors}, an answer {"outputs": tensors} or {"error": text}.
`tensors` is a dict from a name to [dtype, shape, base64 of the little-endian values].
"""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from pathlib import Path

import numpy as np

# Each of these functions opens the model at a path and returns a function that runs it: arrays by
# name -> arrays by name. `fed` holds the inputs of the first run, for runtimes that need shapes.


def onnxruntime(path, fed):
    from ctonnx.ort.runs import Model

    return Model(path).run


def onnxruntime_library(path, fed):
    from ctonnx.ort.runs import Model

    return Model(path, library=True).run


def reference_evaluator(path, fed):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return lambda inputs: named(evaluator.output_names, evaluator.run(None, inputs))


def openvino(path, fed):
    sys.modules["openvino_telemetry"] = None  # reports each import otherwise
    import openvino as ov

    # OpenVINO chooses bfloat16 where the CPU has it, unless told otherwise.
    compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs):
        known = {name for port in compiled.inputs for name in port.names}
        refuse_unknown(inputs, known)
        results = compiled(inputs)
        return {port.get_any_name(): results[port] for port in compiled.outputs}

    return run


def tract(path, fed):
    import tract

    model = tract.onnx().load(path)
    names = [model.input_name(i) for i in range(model.input_count())]
    refuse_unknown(fed, names)
    symbols = {}  # such as the batch size, which tract needs before it optimises
    for i, name in enumerate(names):
        *dims, kind = model.input_fact(i).dump().split(",")
        sizes = [str(size) for size in fed[name].shape]
        symbols |= {d: int(s) for d, s in zip(dims, sizes, strict=True) if d.isidentifier()}
        dims = [s if d == "?" else d for d, s in zip(dims, sizes, strict=True)]
        model.set_input_fact(i, ",".join([*dims, kind]))
    _, outputs = interface(path)  # tract names them after their producers
    typed = model.into_model()
    if symbols:
        typed.transform(tract.SetSymbols(symbols))
    runnable = typed.into_runnable()

    def run(inputs):
        values = runnable.run([inputs[name] for name in names])
        return named(outputs, (value.to_numpy() for value in values))

    return run


def mnn(path, fed):
    from MNN import expr, nn

    with tempfile.TemporaryDirectory() as folder:
        converted = os.path.join(folder, "model.mnn")
        # The package's own command would install a usage reporter and wait for its server.
        code = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
        options = ["-f", "ONNX", "--bizCode", "x", "--modelFile", path, "--MNNModel", converted]
        done = subprocess.run(
            [sys.executable, "-c", code, *options],
            cwd=folder,  # it leaves a file there
            capture_output=True,
            text=True,
        )
        if not os.path.exists(converted):
            raise RuntimeError(f"{done.stdout}{done.stderr}")
        order = nn.load_module_from_file(converted, [], []).get_info()["inputNames"]
        refuse_unknown(fed, order)
        _, outputs = interface(path)
        net = nn.load_module_from_file(converted, order, outputs)
    kinds = {"float32": expr.float, "int64": expr.int64, "int32": expr.int}

    def run(inputs):
        fed = [
            expr.const(
                np.ascontiguousarray(inputs[name]),
                list(inputs[name].shape),
                expr.NCHW,
                kinds[inputs[name].dtype.name],
            )
            for name in order
        ]
        return named(outputs, (np.array(value.read()) for value in net.forward(fed)))

    return run


def jaxonnxruntime(path, fed):
    import onnx
    from jaxonnxruntime.backend import Backend

    backend = Backend.prepare(onnx.load(path))
    _, outputs = interface(path)
    return lambda inputs: named(outputs, map(np.asarray, backend.run(inputs)))


def named(names, values):
    return {name: np.asarray(v) for name, v in zip(names, values, strict=True)}


def refuse_unknown(inputs, known):
    """Raise on inputs that the runtime lacks: most take inputs by position and would drop these."""
    for name in sorted(set(inputs) - set(known)):
        raise ValueError(f"takes the input {name!r}, which has a default, for a constant")


def interface(path):
    """The names of an ONNX file's required inputs and of its outputs, in order."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [v.name for v in graph.input if v.name not in initializers]
    return inputs, [v.name for v in graph.output]


def to_json(arrays):
    return {
        name: [v.dtype.name, list(v.shape), base64.b64encode(np.ascontiguousarray(v)).decode()]
        for name, v in arrays.items()
    }


def from_json(tensors):
    return {  # copies, as OpenVINO refuses read-only arrays
        name: np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
        for name, (dtype, shape, data) in tensors.items()
    }


class Page:
    """onnxruntime-web in headless Chromium, on a page served locally.

    Args:
        npm: the folder where npm installed onnxruntime-web.
    """

    FLAGS = ("--no-sandbox", "--disable-gpu")
    # Blocks the browser's own requests, such as the search for updates.
    QUIET = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)
    SCRIPT = """
        import * as ort from "/ort.wasm.bundle.min.mjs";
        import { answer } from "/worker.mjs";
        ort.env.wasm.numThreads = 1;
        window.answer = (job) => answer(ort, job, (path) => "/model?" + path);
    """

    model = None  # path of the current model

    def __init__(self, npm):
        from playwright.sync_api import sync_playwright

        page, dist = self, Path(npm) / "node_modules" / "onnxruntime-web" / "dist"

        class Files(http.server.SimpleHTTPRequestHandler):
            def translate_path(self, path):
                name = Path(urllib.parse.urlsplit(path).path).name
                files = {"model": page.model, "worker.mjs": Path(__file__).with_name("worker.mjs")}
                return str(files.get(name) or dist / name)

            def guess_type(self, path):
                known = {".mjs": "text/javascript", ".wasm": "application/wasm"}
                return known.get(Path(path).suffix, "application/octet-stream")

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{self._server.server_port}"
        chromium = sync_playwright().start().chromium
        browser = chromium.launch(
            executable_path=shutil.which("chromium"), args=[*self.FLAGS, *self.QUIET]
        )
        self._page = browser.new_page()
        # Start from an empty page of this origin.
        self._page.route(f"{origin}/", lambda route: route.fulfill(body="<!doctype html>"))
        self._page.goto(f"{origin}/")
        self._page.add_script_tag(type="module", content=self.SCRIPT)
        self._page.wait_for_function("() => window.answer")

    def answer(self, job):
        self.model = job["model"]
        return self._page.evaluate("(job) => window.answer(job)", job)


def in_python(opener):
    """A function that answers jobs with `opener`, one of the functions above."""
    opened, run = None, None

    def answer(job):
        nonlocal opened, run
        inputs = from_json(job["inputs"])
        try:
            # Reopen for other inputs: a runtime may accept these after refusing the first.
            if opened != (job["model"], *inputs):
                opened = None
                run = opener(job["model"], inputs)
                opened = job["model"], *inputs
            return {"outputs": to_json(run(inputs))}
        except BaseException as error:  # Runtimes raise whatever they like.
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


def main(name, *arguments):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Libraries print to standard error.
    answer = Page(*arguments).answer if name == "web" else in_python(globals()[name])
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
