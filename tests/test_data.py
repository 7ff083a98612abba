"""Data in batches: what each source gives, that memory does not grow, and what mistakes say."""

import subprocess
import sys

import numpy as np
import pytest

from ctonnx.data import open as opening
from ctonnx.data import rows
from ctonnx.data.batches import Input
from ctonnx.data.open import DataOptions, open_source
from ctonnx.errors import CtonnxError, InputFileError, UsageError

FLOAT, IMAGE = np.dtype(np.float32), (None, 3, 8, 8)
X = [Input("x", FLOAT, (None, 3))]


def everything(source):
    """The inputs, stacked, and labels of all batches; and their number."""
    batches = [source.batch(i) for i in range(len(source))]
    assert source.batch(len(batches)) is None
    held = {name: np.concatenate([b.inputs[name] for b in batches]) for name in batches[0].inputs}
    labels = [b.labels for b in batches if b.labels is not None]
    return held, np.concatenate(labels) if labels else None, len(batches)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(70, 3)).astype(np.float32), rng.integers(0, 4, 70)


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy", "csv", "tuple", "factory"])
def test_every_source_gives_the_same(tmp_path, monkeypatch, arrays, kind):
    monkeypatch.chdir(tmp_path)
    x, y = arrays
    np.savez("d.npz", x=x, label=y)
    np.savez_compressed("c.npz", x=x, y=y)
    np.save("x.npy", x)
    np.save("y.npy", y)
    lines = ["a,b,label,c", *(f"{r[0]!r},{r[1]!r},{v},{r[2]!r}" for r, v in zip(x.tolist(), y))]  # noqa: B905
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n\n")
    spec, labels = {
        "npz": ("d.npz", None),
        "compressed": ("c.npz", None),
        "npy": ("x.npy", "y.npy"),
        "csv": ("d.csv", None),
        "tuple": ((x, y), None),
        "factory": (lambda: ((x[i : i + 32], y[i : i + 32]) for i in range(0, 70, 32)), None),
    }[kind]
    source = open_source(spec, X, DataOptions(labels=labels))
    if kind == "factory":
        batches = [source.batch(i) for i in (2, 0, 1)]
        assert source.batch(3) is None
        np.testing.assert_array_equal(batches[1].inputs["x"], x[:32])
        np.testing.assert_array_equal(batches[0].labels, y[64:])
        return
    held, given, count = everything(source)
    np.testing.assert_array_equal(held["x"], x)
    np.testing.assert_array_equal(given, y)
    assert (held["x"].dtype, count) == (FLOAT, 3)
    # Shuffled: the same rows in another order, the same each time, with their labels.
    first, second = (
        everything(open_source(spec, X, DataOptions(labels, 7), seed=0)) for _ in range(2)
    )
    np.testing.assert_array_equal(first[0]["x"], second[0]["x"])
    order = np.lexsort(first[0]["x"].T)
    assert not np.array_equal(first[0]["x"], x)
    np.testing.assert_array_equal(first[0]["x"][order], x[np.lexsort(x.T)])
    np.testing.assert_array_equal(first[1][order], y[np.lexsort(x.T)])


def test_the_shapes_python_data_come_in(arrays):
    """Pairs as lists, as a DataLoader makes them, inputs alone, and by name."""
    x, y = arrays
    for given in ((x, y), [x, y], {"x": x}, x, ({"x": x}, None), lambda: [[x, y]], lambda: [x]):
        source = open_source(given, X, DataOptions(batch_size=None if callable(given) else 70))
        batch = source.batch(0)
        np.testing.assert_array_equal(batch.inputs["x"], x)
        assert source.batch(1) is None
        if batch.labels is not None:
            np.testing.assert_array_equal(batch.labels, y)
    assert open_source([x, y], X).batch(0).labels is not None
    assert open_source(x, X).batch(0).labels is None


def test_only_what_is_asked_for_is_read(tmp_path, arrays):
    """Arrays that rows cannot be had of, and columns of text, are no hindrance."""
    x, y = arrays
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "d.npz", x=x, label=y, classes=np.array(["a", None], object), n=3)
        source = open_source(tmp_path / "d.npz", X)
        np.testing.assert_array_equal(source.batch(0).labels, y[:32])
    (tmp_path / "d.csv").write_text("name,x,label\nfirst,1,2\nsecond,3,4\n")
    batch = open_source(tmp_path / "d.csv", [Input("x", FLOAT, (None,))]).batch(0)
    assert (batch.inputs["x"].tolist(), batch.labels.tolist()) == ([1, 3], [2, 4])


def test_rows_are_read_in_runs(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(20, 3)
    np.save(tmp_path / "a.npy", array)
    for wanted in ([0], [19], [3, 4, 5, 9, 11, 12], range(20), []):
        indices = np.array(list(wanted), int)
        np.testing.assert_array_equal(rows.Rows(tmp_path / "a.npy")[indices], array[indices])


def test_columns_by_the_names_of_inputs(tmp_path):
    (tmp_path / "d.csv").write_text("age,target,sex\n1.5,7,2\n2.5,8,3\n")
    inputs = [Input("sex", np.dtype(np.int64), (None,)), Input("age", FLOAT, (None, 1))]
    held, labels, _ = everything(open_source(tmp_path / "d.csv", inputs))
    assert (held["sex"].tolist(), held["sex"].dtype) == ([2, 3], np.int64)
    assert held["age"].tolist() == [[1.5], [2.5]]
    assert labels.tolist() == [7, 8]


def picture(seed, size=(12, 10)):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, three and two, and a file that is no image."""
    pytest.importorskip("PIL")
    for i, name in enumerate(("cat/a", "cat/b", "cat/c", "dog/a", "dog/b")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_of_images(folder):
    from PIL import Image

    from ctonnx.data.images import preset_transform

    nchw, nhwc = ([Input("x", FLOAT, shape)] for shape in (IMAGE, (None, 8, 8, 3)))
    held, labels, _ = everything(open_source(folder, nchw))
    assert labels.tolist() == [0, 0, 0, 1, 1]
    (folder / ".cache").mkdir()
    (folder / "__MACOSX").mkdir()
    assert everything(open_source(folder, nchw))[1].tolist() == [0, 0, 0, 1, 1]
    expected = np.asarray(picture(4).resize((8, 8), Image.Resampling.BILINEAR)) / np.float32(255)
    np.testing.assert_array_equal(held["x"][4], expected.transpose(2, 0, 1))
    other, _, _ = everything(open_source(folder, nhwc))
    np.testing.assert_array_equal(other["x"].transpose(0, 3, 1, 2), held["x"])
    # The shorter side to 8, the middle 8 by 8 of it: as torchvision's imagenet transform does.
    given = preset_transform("imagenet", resize=8, crop=8)
    held, _, _ = everything(open_source(folder, nchw, DataOptions(transform=given)))
    middle = picture(0).resize((9, 8), Image.Resampling.BILINEAR).crop((0, 0, 8, 8))
    mean, std = np.float32(given.mean), np.float32(given.std)
    expected = (np.asarray(middle) / np.float32(255) - mean) / std
    np.testing.assert_allclose(held["x"][0], expected.transpose(2, 0, 1), rtol=1e-6)
    # Caffe's: blue first, 0 to 255 less the mean.
    given = preset_transform("caffe", resize=8, crop=8)
    held, _, _ = everything(open_source(folder, nchw, DataOptions(transform=given)))
    expected = (np.asarray(middle, np.float32) - [123, 117, 104])[:, :, ::-1]
    np.testing.assert_allclose(held["x"][0], expected.transpose(2, 0, 1), atol=1e-4)
    gray, _, _ = everything(open_source(folder, [Input("x", np.dtype(np.uint8), (2, 1, 8, 8))]))
    expected = picture(1).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(gray["x"][1, 0], np.asarray(expected))


def shades(folder, *names):
    """Save a grey image of another shade under each name."""
    from PIL import Image

    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / name)


def read(folder):
    """The class names, the labels, the shade of each image, and the notes."""
    source = open_source(folder, [Input("x", FLOAT, IMAGE)])
    held, labels, _ = everything(source)
    shade = np.rint(held["x"][:, 0, 0, 0] * 255 / 20).astype(int)
    return source.classes, labels.tolist(), shade.tolist(), source.notes


def test_folders_named_by_numbers_are_in_the_order_of_text(tmp_path):
    """As torchvision's ImageFolder has them."""
    shades(tmp_path, "1/a.png", "2/a.png", "10/a.png")
    classes, labels, shade, notes = read(tmp_path)
    assert (classes, labels, shade) == (["1", "10", "2"], [0, 1, 2], [0, 2, 1])
    assert notes == [
        f"the class folders of {tmp_path} are in the order of text, as torchvision has them: "
        "1, 10, 2, ... are 0, 1, 2, ..."
    ]
    (tmp_path / "10").rename(tmp_path / "3")
    assert read(tmp_path) == (["1", "2", "3"], [0, 1, 2], [0, 1, 2], [])


def test_images_are_found_below_the_class_folders(tmp_path):
    shades(tmp_path, "a/2/x.png", "a/1.png", "a/2/deep/y.png", "b/c/z.png")
    # A link that leads back up is followed once.
    (tmp_path / "a" / "2" / "loop").symlink_to(tmp_path / "a")
    assert read(tmp_path) == (["a", "b"], [0, 0, 0, 1], [1, 2, 0, 3], [])


def test_class_folders_that_look_hidden(tmp_path):
    shades(tmp_path, "_unknown/a.png", "a/a.png", ".first/a.png")
    (tmp_path / ".cache").mkdir()
    classes, labels, shade, notes = read(tmp_path)
    assert (classes, labels, shade) == ([".first", "_unknown", "a"], [0, 1, 2], [2, 0, 1])
    assert notes == [
        f"{tmp_path / '.first'} holds 1 images: it counts as a class, as for torchvision"
    ]


def test_images_that_torchvision_leaves_out_are_counted(tmp_path):
    shades(tmp_path, "a/a.png", "b/a.gif", "b/b.GIF")
    assert read(tmp_path)[3] == [
        f"2 images of {tmp_path} are of kinds that torchvision leaves out, .gif"
    ]


def test_images_of_16_bits_are_scaled(tmp_path):
    from PIL import Image

    inputs = [Input("x", FLOAT, (None, 1, 1, 3))]
    pixels = np.array([[300, 40000, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = everything(open_source(tmp_path, inputs))[0].values()
    np.testing.assert_allclose(batch.ravel(), pixels[0] / 65535, atol=0.5 / 255)
    for dtype in np.int32, np.float32:
        Image.fromarray(pixels.astype(dtype)).save(tmp_path / "a.tif")
        with pytest.raises(
            InputFileError, match=r"a\.tif: cannot be read as an image: 32-bit pixels"
        ):
            everything(open_source(tmp_path, inputs))


@pytest.mark.parametrize(
    ("array", "kind"),
    [([[200]], np.int8), ([[2**31 + 5]], np.int32), ([[1e6]], np.float16), ([[1e39]], FLOAT)],
)
def test_numbers_become_no_others(array, kind):
    kept, changed = np.array([[1]]), np.array(array)
    for given in (kept, changed) if changed.dtype.kind == "i" else (kept * 0.1, changed):
        source = open_source(given, [Input("x", np.dtype(kind), (None, 1))])
        if given is changed:
            with pytest.raises(UsageError, match=r"'x' holds numbers that \w+ cannot"):
                source.batch(0)
        else:
            assert source.batch(0).inputs["x"] == given.astype(kind)


def test_images_from_a_csv_file_and_without_labels(folder):
    inputs = [Input("x", FLOAT, IMAGE)]
    (folder.parent / "list.csv").write_text("path,class\nimages/dog/b.png,5\nimages/cat/a.png,6\n")
    held, labels, _ = everything(
        open_source(folder.parent / "list.csv", inputs, DataOptions(labels="class"))
    )
    assert labels.tolist() == [5, 6]
    whole, _, _ = everything(open_source(folder, inputs))
    np.testing.assert_array_equal(held["x"], whole["x"][[4, 0]])
    _, labels, _ = everything(open_source(folder / "dog", inputs))
    assert labels is None


def test_broken_images_are_skipped_and_counted(folder):
    inputs = [Input("x", FLOAT, IMAGE)]
    good = (folder / "cat" / "a.png").read_bytes()
    (folder / "cat" / "b.png").write_bytes(good[: len(good) // 2])
    (folder / "dog" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputFileError, match=r"b\.png: cannot be read as an image.*--skip-broken"):
        open_source(folder, inputs).batch(0)
    source = open_source(folder, inputs, DataOptions(batch_size=3, skip_broken=True))
    batches = [source.batch(i) for i in range(len(source))]
    assert [(len(b), b.broken) for b in batches] == [(2, 1), (1, 1)]
    assert np.concatenate([b.labels for b in batches]).tolist() == [0, 0, 1]
    assert open_source(folder, inputs, DataOptions(skip_broken=True)).batch(0).labels.tolist() == [
        0,
        0,
        1,
    ]


def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, folder, arrays):
    monkeypatch.chdir(tmp_path)
    x, y = arrays
    image = [Input("x", FLOAT, IMAGE)]
    np.savez("d.npz", x=x, label=y)
    np.savez("other.npz", z=x)
    np.savez("rows.npz", x=x, label=y[:5])
    np.savez("wide.npz", x=x[:, :2], label=y)
    np.savez("objects.npz", x=np.array([{}], object))
    np.savez("none.npz", x=x[:0], label=y[:0])
    np.save("x.npy", x)
    np.save("f.npy", np.asfortranarray(x))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-99])
    (tmp_path / "text.csv").write_text("a,b,c\n1,2,x\n")
    (tmp_path / "gap.csv").write_text("a,b,label\n1,2,\n")
    (tmp_path / "part.csv").write_text("a,b,c\n1,2,1.9\n")
    (tmp_path / "short.csv").write_text("a,b,c\n1,2\n")
    (tmp_path / "head.csv").write_text("a,b,c\n")
    (tmp_path / "bare.csv").write_text("1,2,3\n4,5,6\n")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "mod.py").write_text("a = 1\ndef three(): return [(1, 2, 3)]\n")
    two = [*X, Input("z", FLOAT, (None, 3))]
    for spec, inputs, options, line in [
        ("missing.npz", X, {}, "missing.npz: no such file"),
        ("missing.csv", X, {}, "missing.csv: no such file"),
        ("bare.csv", X, {}, "its first line holds numbers: a header of names is missing"),
        ("d.txt", X, {}, "expected .npz, .npy, .csv, a folder of images, or PKG:FACTORY"),
        ("other.npz", X, {}, "holds no array 'x', which the model takes: it holds z"),
        ("rows.npz", X, {}, "the numbers of rows differ: x 70, labels 5"),
        ("wide.npz", X, {}, "x: the data are float32[N,2], the model takes float32[N,3]"),
        ("d.npz", [Input("x", np.dtype(np.int64), (None, 3))], {}, "the model takes int64[N,3]"),
        ("d.npz", X, {"labels": "truth"}, "holds no array 'truth': it holds x, label"),
        ("d.npz", X, {"batch_size": 0}, "batch size must be at least 1"),
        ("d.npz", [Input("x", FLOAT, (4, 3))], {"batch_size": 5}, "takes batches of 4"),
        (
            "d.npz",
            X,
            {"transform": object()},
            "the image options (preset, resize, crop, mean, std) do not apply to d.npz, which is",
        ),
        ("d.npz", X, {"labels": np.zeros(70)}, "labels must be a name or a path: give arrays as"),
        ("d.npz", X, {"skip_broken": True}, "the option skip-broken does not apply to d.npz"),
        (
            lambda: [(x, y)],
            X,
            {"labels": "y"},
            "the option labels does not apply to a factory: leave it out",
        ),
        (
            lambda: [(x, y)],
            X,
            {"batch_size": 3},
            "the option batch does not apply to a factory: leave it out",
        ),
        ((x, y), X, {"labels": "y"}, "the option labels does not apply to arrays: leave it out"),
        ("objects.npz", X, {}, "holds objects"),
        ("none.npz", X, {}, "none.npz: holds no samples"),
        ("f.npy", X, {}, "is in Fortran order"),
        ("x.npy", two, {}, "the model has several inputs, x, z"),
        ("cut.npy", X, {}, "cut.npy: is truncated"),
        ("cut.npz", X, {}, "cut.npz: cannot be read: File is not a zip file"),
        ("text.csv", X, {}, "text.csv: could not convert string to float"),
        ("gap.csv", X, {}, "gap.csv: a label is missing"),
        ("text.csv", X, {"labels": "d"}, "has no column 'd': it has a, b, c"),
        ("short.csv", X, {}, "data row 1 has 2 fields, the header 3"),
        ("head.csv", X, {}, "holds no rows below a header"),
        ("text.csv", image, {}, "has no column 'path'"),
        ("empty", image, {}, "empty: holds no images"),
        ("images", X, {}, "holds images, but the model does not take exactly one image"),
        ("images", [Input("x", FLOAT, (None, 3, 9, None))], {}, "images differ in size"),
        ("no_such_module:make", X, {}, "cannot be imported"),
        ("mod:b", X, {}, "mod:b: the module has no function of that name"),
        ("mod:a", X, {}, "mod:a: the module has no function of that name"),
        ("mod:three", X, {}, "gave 3 values, expected inputs and labels"),
        ((x[:, None], y), X, {}, "x: the data are float32[N,1,3]"),
        ((x, y, y), X, {}, "expected a path, PKG:FACTORY, (inputs, labels) as arrays"),
        ([(x, y), (x, y)], X, {}, "or a function that gives batches, got a list"),
        (42, X, {}, "got a int"),
        (lambda: None, X, {}, "<lambda>: gave a NoneType, expected an iterable"),
        (lambda: 1 / 0, X, {}, "<lambda>: fails when it is called: ZeroDivisionError"),
        (lambda: (1 / 0 for _ in [1]), X, {}, "fails when it is called: ZeroDivisionError"),
        (lambda: {"x": x}, X, {}, "fails when it is called: KeyError"),
        (lambda: [None], X, {}, "a batch holds None, expected a row per sample"),
        (lambda: [(x, 3)], X, {}, "labels: a batch holds 3, expected a row per sample"),
        ("part.csv", [Input("x", np.dtype(np.int64), (None, 3))], {}, "1.9 is not a whole number"),
        (({"z": x}, y), X, {}, "the data lack the input 'x': they hold z"),
    ]:
        if line == "images differ in size":
            picture(0, (9, 9)).save(folder / "cat" / "other.png")
        with pytest.raises((InputFileError, UsageError)) as caught:
            open_source(spec, inputs, DataOptions(**options)).batch(0)
        assert line in str(caught.value), spec
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, CtonnxError)


def test_presets_and_their_mistakes():
    from ctonnx.data.images import preset_transform

    assert preset_transform("imagenet", crop=192).crop == 192
    for given in ({"preset": "unknown"}, {"preset": "plain", "std": (0.0,)}, {"crop": 0}):
        with pytest.raises(UsageError):
            preset_transform(**({"preset": "plain"} | given))


@pytest.mark.parametrize("kind", ["npz", "compressed", "csv"])
def test_memory_does_not_grow_with_the_data(tmp_path, kind):
    """Peak memory of reading 8 MB and 64 MB, each in a process of its own."""
    program = """if True:
        import re, sys
        import numpy as np
        from ctonnx.data.batches import Input
        from ctonnx.data.open import open_source
        source = open_source(sys.argv[1], [Input("x", np.dtype(np.float32), (None, {}))])
        for i in range(len(source)):
            assert len(source.batch(i))
        # Not ru_maxrss, which also counts the process that this one was forked from.
        print(re.search("VmHWM:\\\\s*(\\\\d+)", open("/proc/self/status").read())[1])"""
    width = 4 if kind == "csv" else 2048
    peaks = []
    for count in (1000, 8000):
        file = tmp_path / f"d{count}.{'csv' if kind == 'csv' else 'npz'}"
        if kind == "csv":
            file.write_text("a,b,c,d,label\n" + "0.5,1.5,2.5,3.5,1\n" * (count * 10))
        else:
            save = np.savez_compressed if kind == "compressed" else np.savez
            save(file, x=np.zeros((count, width), np.float32), label=np.zeros(count, int))
        command = [sys.executable, "-c", program.format(width), str(file)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
    assert peaks[1] - peaks[0] < 6_000, peaks


def test_a_fixed_batch_size_is_the_models():
    assert opening._batch_size(None, [Input("x", FLOAT, (4, 3))]) == 4
    assert opening._batch_size(8, X) == 8
