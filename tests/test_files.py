"""Model files: external data, and nothing half-written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import parsed
from onnx import AttributeProto, TensorProto, helper

import ctonnx
from ctonnx.errors import ModelError, UsageError
from ctonnx.model import external as external_data
from ctonnx.model import files
from ctonnx.rewriting.steered import SteeredModel

X = np.float32([[-9, -0.1, 1, 2], [0, 0.5, 5.9, 8]])

WEIGHTED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { h = Add(x, w)  y = Relu(h) }"""


@pytest.fixture
def external(tmp_path):
    """A model whose weight lies in in/weights.bin."""
    model = onnx.parser.parse_model(WEIGHTED)
    weight = onnx.numpy_helper.from_array(np.float32([1, 2, 3, 4]), "w")
    model.graph.initializer.append(weight)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def _attribute(model, **fields):
    model.graph.node[0].attribute.add(name="extra", **fields)
    return model.graph.node[0].attribute[0]


def _function(model):
    model.functions.add(name="F", domain="f").node.add(op_type="Constant")
    return model.functions[0]


# Every place for a tensor in a model -> function that adds one there.
PLACES = {
    "initializer": lambda model: model.graph.initializer[0],
    "sparse values": lambda model: model.graph.sparse_initializer.add().values,
    "sparse indices": lambda model: model.graph.sparse_initializer.add().indices,
    "attribute": lambda model: _attribute(model, type=AttributeProto.TENSOR).t,
    "attribute list": lambda model: _attribute(model, type=AttributeProto.TENSORS).tensors.add(),
    "sparse attribute": lambda model: (
        _attribute(model, type=AttributeProto.SPARSE_TENSOR).sparse_tensor.values
    ),
    "subgraph": lambda model: _attribute(model, type=AttributeProto.GRAPH).g.initializer.add(),
    "function": lambda model: _function(model).node[0].attribute.add(name="value", type=4).t,
    "default": lambda model: _function(model).attribute_proto.add(name="a", type=4).t,
    "training": lambda model: model.training_info.add().algorithm.initializer.add(),
}


def run(path):
    (y,) = ctonnx.session(path).run(None, {"x": np.float32([[-9, 0, 1, 2]])})
    return y


def test_external_data_are_shared_in_the_same_folder(external):
    steered = ctonnx.patch(external, 1.0)
    assert sorted(os.listdir(external.parent)) == ["model.ct.onnx", "model.onnx", "weights.bin"]
    assert (external.parent / "weights.bin").stat().st_size == 16
    np.testing.assert_allclose(run(steered), [[0, 2, 4, 6]], atol=1e-5)


def test_external_data_are_copied_to_another_folder(external, tmp_path):
    (tmp_path / "out").mkdir()
    steered = ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx")
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "weights.bin"]
    np.testing.assert_allclose(run(steered), [[0, 2, 4, 6]], atol=1e-5)
    # The target may hold the same data already; other data are never overwritten.
    ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx", force=True)
    (tmp_path / "out" / "weights.bin").write_bytes(b"somebody else's!")
    with pytest.raises(UsageError, match=r"weights\.bin: exists and holds other data"):
        ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx", force=True)
    assert (tmp_path / "out" / "weights.bin").read_bytes() == b"somebody else's!"
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "weights.bin"]


# Every number lies in a file: bounds of Clip, Max and Min, and the slope of PRelu.
NUMBERS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 4] x) => (float[2, 4] y) <float lo = {0}, float hi = {6}, float slope = {0.25}>
{ a = Clip(x, lo, hi)  b = Max(a, lo)  c = Min(b, hi)  d = PRelu(c, slope)  y = Relu(d) }"""


def save_numbers(model, path):
    """Save a model with every initializer in n.bin."""
    for tensor in model.graph.initializer:  # onnx moves raw data alone.
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path, save_as_external_data=True, location="n.bin", size_threshold=0)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.onnx"
    save_numbers(parsed(NUMBERS), path)
    return path


def test_numbers_in_external_data_count_and_stay_there(numbers, tmp_path):
    inline = parsed(NUMBERS)
    assert ctonnx.inspect(numbers) == ctonnx.inspect(inline)
    assert [a.status for a in ctonnx.inspect(numbers)] == ["steerable"] * 4
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        steered = ctonnx.patch(numbers, 0.7, output=folder / "s.onnx")
        tensors = onnx.load(steered, load_external_data=False).graph.initializer
        external = {t.name for t in tensors if t.data_location == TensorProto.EXTERNAL}
        assert {"lo", "hi"} <= external
        expected = ctonnx.session(ctonnx.patch(inline, 0.7)).run(None, {"x": X})
        np.testing.assert_array_equal(ctonnx.session(steered).run(None, {"x": X}), expected)
        original = ctonnx.unpatch(steered, output=folder / "again.onnx")
        assert original.read_bytes() == numbers.read_bytes()


def test_numbers_that_cannot_be_read_safely_are_a_reason_to_skip(numbers):
    model = onnx.load(numbers, load_external_data=False)
    reasons = {a.op: a.reason for a in ctonnx.inspect(model)}
    assert "another file" in reasons["Clip"]
    assert "another file" in reasons["Max"]
    assert reasons["Relu"] is None
    (numbers.parent / "n.bin").rename(numbers.parent / "moved.bin")
    assert {a.op: a.reason for a in ctonnx.inspect(numbers)} == reasons
    for tensor in model.graph.initializer:
        _set_external(tensor, {"location": "../" + numbers.parent.name + "/moved.bin"})
    numbers.write_bytes(model.SerializeToString())
    assert {a.op: a.reason for a in ctonnx.inspect(numbers)} == reasons


def test_beta_in_external_data_can_be_seen_and_set(tmp_path):
    path = tmp_path / "s.onnx"
    save_numbers(ctonnx.patch(parsed(NUMBERS), 0.7), path)
    assert {a.beta for a in ctonnx.inspect(path)} == {0.7}
    with files.Transaction(path, path, force=True) as edit:
        SteeredModel(edit.model).set(0.9)
    assert {a.beta for a in ctonnx.inspect(path)} == {0.9}
    (tmp_path / "n.bin").write_bytes(b"")
    assert {a.beta for a in ctonnx.inspect(path)} == {0.9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "../weights.bin"}, "unsafe external data location"),
        ({"location": "/etc/passwd"}, "unsafe external data location"),
        ({"location": "sub/../../weights.bin"}, "unsafe external data location"),
        ({"location": "link.bin"}, "leaves the model's folder"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "missing.bin"}, "missing"),
        ({"offset": "8"}, "too short"),
        ({"offset": "-8"}, "too short"),
        ({"length": "1000"}, "too short"),
        ({"length": "8"}, "too short"),
        ({"length": "many"}, "external data of 'w'"),
        ({"location": "loop"}, "external data of 'w'"),
        ({"location": "a\0b"}, "external data of 'w'"),
        ({"location": "x" * 300}, "external data of 'w'"),
        ({"location": ""}, "unsafe external data location"),
        ({"location": "."}, "no regular file"),
        ({"location": "sub/../weights.bin"}, "unsafe external data location"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "unsafe external data location"),
        ({"location": "/dev/zero"}, "unsafe external data location"),
        ({"offset": str(2**63 - 1)}, "too short"),
        ({"offset": str(2**64)}, "too short"),
        ({"offset": str(-(2**63))}, "too short"),
        ({"offset": "9" * 5000}, "external data of 'w'"),
        ({"length": str(2**63 - 1)}, "too short"),
        ({"length": "-1"}, "too short"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", PLACES)
def test_unsafe_external_data_are_refused(external, tmp_path, change, message, place):
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    (external.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    (external.parent / "loop").symlink_to(external.parent / "loop")
    os.mkfifo(external.parent / "pipe")
    model = onnx.load(external, load_external_data=False)
    tensor = PLACES[place](model)
    tensor.CopyFrom(model.graph.initializer[0])
    entries = {"location": "weights.bin", "offset": "0", "length": "16"}
    _set_external(tensor, entries)
    external.write_bytes(model.SerializeToString())
    ctonnx.patch(external, 0.5, force=True)
    _set_external(tensor, entries | change)
    external.write_bytes(model.SerializeToString())
    before = sorted(os.listdir(external.parent))
    with pytest.raises(ModelError, match=message) as caught:
        ctonnx.patch(external, 0.5, force=True)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(external.parent)) == before


def _set_external(tensor, entries):
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("dims", [[-4], [-2, -2], [2**62], [2**63 - 1, 2**63 - 1], [5]])
def test_external_data_of_impossible_dimensions_are_refused(external, dims):
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].dims[:] = dims
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"too short|a dimension is negative"):
        ctonnx.patch(external, 0.5)


def test_external_data_entries_with_a_key_twice_are_refused(external):
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].external_data.add(key="location", value="../weights.bin")
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="a key is given twice"):
        ctonnx.patch(external, 0.5)


def test_hard_links_and_links_that_stay_inside_are_fine(external, tmp_path):
    (external.parent / "sub").mkdir()
    os.rename(external.parent / "weights.bin", external.parent / "sub" / "kept.bin")
    os.link(external.parent / "sub" / "kept.bin", external.parent / "hard.bin")
    (external.parent / "weights.bin").symlink_to("sub/kept.bin")
    for location in ("weights.bin", "hard.bin", "sub/kept.bin", "./sub//kept.bin"):
        model = onnx.load(external, load_external_data=False)
        _set_external(model.graph.initializer[0], {"location": location})
        external.write_bytes(model.SerializeToString())
        out = tmp_path / location.replace("/", "_")
        out.mkdir()
        assert ctonnx.patch(external, 0.5, force=True).exists()
        steered = ctonnx.patch(external, 1.0, output=out / "m.onnx")
        assert not (out / location).is_symlink()
        np.testing.assert_allclose(run(steered), [[0, 2, 4, 6]], atol=1e-5)


def test_the_walk_over_tensors_covers_all_of_protobuf():
    kinds = onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name
    holding = {"TensorProto"}
    for _ in kinds:
        holding |= {
            name
            for name, kind in kinds.items()
            if any(f.message_type and f.message_type.name in holding for f in kind.fields)
        }
    assert holding == external_data._HOLDING_TENSORS


def test_a_failing_edit_leaves_nothing_and_changes_nothing(external, tmp_path):
    def fail(path):
        assert run(path).shape == (1, 4)
        raise ZeroDivisionError

    (tmp_path / "out").mkdir()
    for folder in (external.parent, tmp_path / "out"):
        (folder / "old.onnx").write_bytes(b"before")
        before = sorted(os.listdir(folder))
        with (
            pytest.raises(ZeroDivisionError),
            files.Transaction(external, folder / "old.onnx", True) as edit,
        ):
            fail(edit.stage())
        assert sorted(os.listdir(folder)) == before
        assert (folder / "old.onnx").read_bytes() == b"before"


def test_a_failing_edit_leaves_no_folder(external, tmp_path, monkeypatch):
    model = files.load(external)
    (external.parent / "sub").mkdir()
    (external.parent / "weights.bin").rename(external.parent / "sub" / "weights.bin")
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "sub/weights.bin"
    external.write_bytes(model.SerializeToString())
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UsageError, match="No space left"):
        ctonnx.patch(external, 0.5, output=tmp_path / "out" / "m.onnx")
    assert os.listdir(tmp_path / "out") == []
    monkeypatch.undo()
    ctonnx.patch(external, 0.5, output=tmp_path / "out" / "m.onnx")
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "sub"]


def test_the_output_may_not_be_the_data(external):
    with pytest.raises(UsageError, match="data of the model itself"):
        ctonnx.patch(external, 0.5, output=external.parent / "weights.bin", force=True)
    assert (external.parent / "weights.bin").stat().st_size == 16


def test_an_unreadable_file_is_an_error(tmp_path):
    for data in (
        b"",
        bytes(100),
        parsed(WEIGHTED.replace("w)", "x)")).SerializeToString()[:40],
    ):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(ModelError, match="not an ONNX model"):
            files.load(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="no regular file"):
        files.load(tmp_path / "pipe")


def limited(program, *arguments):
    """Peak memory and data read, in MiB, of running `work`, which `program` defines.

    The memory is VmHWM, since ru_maxrss would start at that of the process that runs the tests.
    """
    code = (
        "import re, sys\nfrom ctonnx import api\nfrom ctonnx.model import files\n"
        "def figure(file, pattern): return int(re.search(pattern, open(file).read())[1])\n"
        f"{program}\nbefore = figure('/proc/self/io', r'rchar: (\\d+)')\nwork()\n"
        "print(figure('/proc/self/status', r'VmHWM:\\s+(\\d+) kB') / 1024)\n"
        "print((figure('/proc/self/io', r'rchar: (\\d+)') - before) / 1024**2)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return map(float, done.stdout.split())


PATCH = "work = lambda: api.patch(sys.argv[1], 0.85, output=sys.argv[2])"
READ_AND_WRITE = """
def fail(*arguments):
    raise OSError(38, "Function not implemented")
files.os.copy_file_range = fail
"""


def large_model(folder, size):
    """A model of 48 layers whose `size` bytes of weights are in a sparse file."""
    folder.mkdir()
    with open(folder / "weights.bin", "wb") as stream:
        stream.truncate(size)
    if (folder / "weights.bin").stat().st_blocks:
        pytest.skip("the file system has no sparse files, so the weights would fill the disk")
    layers = "".join(f"h{i} = MatMul(y{i}, w{i})\n y{i + 1} = Relu(h{i})\n" for i in range(48))
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g (float[N, 4096] y0) => (float[N, 4096] y48) {{ {layers} }}"
    )
    each = size // 48
    for i in range(48):
        tensor = model.graph.initializer.add(name=f"w{i}", data_type=TensorProto.FLOAT)
        tensor.dims[:] = [4096, each // 4 // 4096]
        tensor.data_location = TensorProto.EXTERNAL
        _set_external(
            tensor, {"location": "weights.bin", "offset": str(i * each), "length": str(each)}
        )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_six_gigabytes_in_the_same_folder(tmp_path):
    """Patching stays within 200 MiB and does not read the data, which stay where they are."""
    path = large_model(tmp_path / "in", 6 << 30)
    memory, read = limited(PATCH, path, tmp_path / "in" / "steered.onnx")
    assert memory < 200
    assert read < 1
    assert (tmp_path / "in" / "weights.bin").stat().st_blocks == 0
    assert len(os.listdir(tmp_path / "in")) == 3


@pytest.mark.parametrize("without", ["", READ_AND_WRITE], ids=["in the kernel", "read and write"])
def test_data_go_to_another_folder_in_constant_memory(tmp_path, without):
    """Copying a gigabyte stays within 200 MiB; so does comparing it with an existing copy."""
    size = 48 * 4096 * 4 * 1024
    if shutil.disk_usage(tmp_path).free < 3 * size:
        pytest.skip("the disk has no room for two gigabytes")
    path = large_model(tmp_path / "in", size)
    (tmp_path / "out").mkdir()
    for name in "first.onnx", "second.onnx":
        memory, _ = limited(without + PATCH, path, tmp_path / "out" / name)
        assert memory < 200
    assert (tmp_path / "out" / "weights.bin").stat().st_size == size
    assert len(os.listdir(tmp_path / "out")) == 3
    shutil.rmtree(tmp_path / "out")


def many_activations(count):
    """A chain; every second activation has its own slope. IR 3, so initializers are inputs."""
    model = onnx.parser.parse_model(WEIGHTED.replace("8", "3").replace("17", "9"))
    del model.graph.node[:], model.graph.output[:]
    last = "x"
    for i in range(count):
        model.graph.node.add(op_type="Add", input=[last, f"w{i}"], output=[f"h{i}"])
        node = model.graph.node.add(op_type="Relu", input=[f"h{i}"], output=[f"y{i}"])
        if i % 2:
            node.op_type = "LeakyRelu"
            node.attribute.append(helper.make_attribute("alpha", i / 20_000))
        model.graph.initializer.append(helper.make_tensor(f"w{i}", TensorProto.FLOAT, [], [1]))
        model.graph.input.append(helper.make_tensor_value_info(f"w{i}", TensorProto.FLOAT, []))
        last = f"y{i}"
    model.graph.output.add(name=last)
    return model


def many_subgraphs(count):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[4] y0) => (float[4] y1) { }'
    )
    for i in range(count):
        node = model.graph.node.add(op_type="If", input=["c"], output=[f"y{i + 1}"])
        relu = helper.make_node("Relu", [f"y{i}"], ["b"])
        for branch in "then_branch", "else_branch":
            subgraph = helper.make_graph([relu], "g", [], [onnx.ValueInfoProto(name="b")])
            node.attribute.append(helper.make_attribute(branch, subgraph))
    return model


def many_functions(count):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[4] y0) => (float[4] y1) { }'
    )
    imports = [helper.make_opsetid("", 17)]
    for i in range(count):
        model.graph.node.add(domain="f", op_type=f"F{i}", input=[f"y{i}"], output=[f"y{i + 1}"])
        relu = helper.make_node("Relu", ["a"], ["b"])
        model.functions.append(helper.make_function("f", f"F{i}", ["a"], ["b"], [relu], imports))
    return model


def test_twenty_thousand_activations_there_and_back():
    model = many_activations(20_000)
    assert ctonnx.unpatch(ctonnx.patch(model, 0.85)) == model


def instructions(work):
    """The number of Python instructions, which does not depend on the load of the machine.

    It leaves out work in C, which benchmarks/rewrite.py shows.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def squares(model):
    """Work that is quadratic in the number of nodes, as a counterexample."""
    for _ in model.graph.node:
        for _ in model.graph.node:
            pass


@pytest.mark.parametrize("make", [many_activations, many_subgraphs, many_functions])
def test_work_is_linear_in_the_size_of_the_model(make):
    """Four times the activations take four times the work; quadratic work would take sixteen."""
    few, many = make(100), make(400)
    steered = ctonnx.patch(few, 0.5), ctonnx.patch(many, 0.5)

    def growth(work, few, many):
        return instructions(lambda: work(many)) / instructions(lambda: work(few))

    assert growth(lambda model: ctonnx.patch(model, 0.5), few, many) < 4.2
    assert growth(ctonnx.unpatch, *steered) < 4.2
    assert growth(squares, few, many) > 15
    assert (
        growth(lambda model: (squares(model), squares(model), ctonnx.patch(model, 0.5)), few, many)
        > 4.2
    )


def test_a_model_too_large_for_protobuf_is_an_error(tmp_path, monkeypatch):
    with open(tmp_path / "huge.onnx", "wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(ModelError, match=r"huge\.onnx: larger than the 2 GiB .* external data$"):
        files.load(tmp_path / "huge.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(parsed(WEIGHTED.replace("w)", "x)")).SerializeToString())
    monkeypatch.setattr(files, "_LARGEST", path.stat().st_size)
    with pytest.raises(ModelError, match=r"model\.ct\.onnx: larger than the 2 GiB"):
        ctonnx.patch(path, 0.5)
    assert sorted(os.listdir(tmp_path)) == ["huge.onnx", "model.onnx"]


def test_progress_counts_every_byte_once(external, tmp_path):
    class Bar:
        def __init__(self, total):
            self.total, self.done = total, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            self.done.append(count)

    bars = []
    (tmp_path / "out").mkdir()
    for name in "a", "b":
        with files.Transaction(external, tmp_path / "out" / name, progress=Bar):
            pass
    with files.Transaction(external, external.parent / "c", progress=Bar):
        pass
    (bar,) = bars
    assert bar.total == sum(bar.done) == 16


def test_bytes_do_not_depend_on_the_run(tmp_path):
    """The order of sets must not matter: Python's hashes differ from run to run."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
g (float[4] x, float16[4] z) => (float[4] y, float16[4] v) {
  a = LeakyRelu<alpha = 0.1>(x)  y = f.F(a)  b = Relu(z)  v = LeakyRelu<alpha = 0.2>(b)
}
<domain: "f", opset_import: ["" : 17]> F (x) => (y) { a = Relu(x) y = LeakyRelu(a) }""")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    written = set()
    for seed in "1", "2", "3":
        output = tmp_path / f"{seed}.onnx"
        program = f"import sys\nfrom ctonnx import api\n{PATCH}\nwork()"
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / "m.onnx", output],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        written.add(output.read_bytes())
    assert len(written) == 1


def test_an_output_at_the_place_of_external_data_is_refused(external, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="where data of the model go"):
        ctonnx.patch(external, 0.5, output=tmp_path / "out" / "weights.bin")
    model = onnx.load(external, load_external_data=False)
    (external.parent / "sub").mkdir()
    os.rename(external.parent / "weights.bin", external.parent / "sub" / "w")
    _set_external(model.graph.initializer[0], {"location": "sub/w"})
    external.write_bytes(model.SerializeToString())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leaves its folder through a link"):
        ctonnx.patch(external, 0.5, output=tmp_path / "out" / "m.onnx")
    assert os.listdir(tmp_path / "out") == ["sub"]
    assert os.listdir(tmp_path / "elsewhere") == []


# The script forks a writer for each kill, which saves the imports. The writer edits a file in place
# and writes a model with its data to new folders, until it is killed. The script prints how many
# kills left files behind.
KILLS = """
import os, random, shutil, signal, sys, time
from itertools import count
from pathlib import Path
from ctonnx import api
from ctonnx.model import files
from ctonnx.rewriting.steered import SteeredModel

source, work, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
data = (source.parent / "weights.bin").read_bytes()
original = source.read_bytes()
api.patch(source, 0.5, output=source.parent / "steered.onnx")
steered = source.parent / "steered.onnx"

def set_(beta):
    with files.Transaction(steered, steered, force=True) as edit:
        SteeredModel(edit.model).set(beta)

def once(i):
    set_((0.5, 0.7)[i % 2])
    (work / str(i)).mkdir()
    api.patch(source, 0.5, output=work / str(i) / "m.onnx")

patched = steered.read_bytes()
set_(0.7)
valid = {patched, steered.read_bytes()}
begin = time.perf_counter()
once(0)
typical = time.perf_counter() - begin
shutil.rmtree(work / "0")

def leftovers(folder, known):
    for file in folder.iterdir():
        if file.name not in known:
            assert file.name.startswith(".ctonnx-") and file.suffix != ".onnx", file
            yield file

interrupted, seen = 0, set()
for _ in range(kills):
    child = os.fork()
    if not child:
        for i in count():
            once(i)
    time.sleep(random.uniform(0.2, 3) * typical)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert source.read_bytes() == original
    assert (source.parent / "weights.bin").read_bytes() == data
    seen.add(steered.read_bytes())
    assert seen <= valid
    left = list(leftovers(source.parent, ("model.onnx", "steered.onnx", "weights.bin")))
    for folder in work.iterdir():
        left += leftovers(folder, ("m.onnx", "weights.bin"))
        if (folder / "weights.bin").exists():
            assert (folder / "weights.bin").read_bytes() == data
        if (folder / "m.onnx").exists():
            assert (folder / "m.onnx").read_bytes() == patched
            assert (folder / "weights.bin").exists()
        shutil.rmtree(folder)
    interrupted += bool(left)
    for file in left:
        if file.is_file():
            file.unlink()
assert seen == valid
print(interrupted)
"""


def test_sigkill_at_any_moment_damages_nothing(external, tmp_path):
    model = onnx.load(external, load_external_data=False)
    (external.parent / "weights.bin").write_bytes(np.random.default_rng(0).bytes(1 << 20))
    model.doc_string = "long enough to be caught half-written " * 20_000
    external.write_bytes(model.SerializeToString())
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, external, tmp_path / "work", "200"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Kills between two writes would show nothing.
    assert int(done.stdout) > 20
