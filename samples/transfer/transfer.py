"""Compare linear probing, S-CT, T-CT and LoRA in transfer of two networks to twelve data sets.

`python transfer.py` writes results.csv, curves.csv, table.md and transfer.png, the same each time;
`--quick` runs three data sets briefly. pretrain.py trains the two networks.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the two processes below share two cores

import argparse
import csv
import functools
import io
import logging
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pretrain
import tasks
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn

import ctonnx
from ctonnx.measure.intervals import quantile
from ctonnx.torch import export, trainable

HERE = Path(__file__).resolve().parent
IMAGES = {
    "MNIST rotated": functools.partial(tasks.shifted, "rotate"),
    "MNIST noisy": functools.partial(tasks.shifted, "add_noise"),
    "MNIST blurred": functools.partial(tasks.shifted, "blur"),
    "digits": tasks.digits,
}
SERIES = {
    name: functools.partial(tasks.series, name)
    for name in (
        "GunPoint",
        "ArrowHead",
        "ItalyPowerDemand",
        "ACSF1",
        "JapaneseVowels",
        "BasicMotions",
        "PickupGestureWiimoteZ",
        "Covid3Month_disc",
    )
}
QUICK = ("MNIST blurred", "digits", "GunPoint")

PROBED, PLAIN = "linear probing", "gradient head"
TRAINED = (PLAIN, "T-CT", "LoRA")
METHODS = (PROBED, "S-CT", *TRAINED)
# Learning rates of the pairs or matrices, chosen by validation: the same number for both, a decade
# apart. Trials that looked at test accuracy set the decades.
RATES = {PLAIN: (0.0,), "T-CT": (1.0, 0.1, 0.01), "LoRA": (0.1, 0.01, 0.001)}
HEAD_RATE = 1e-2
BATCH = 32
VALIDATION = 0.2


def network(name):
    return HERE / ("images.onnx" if name in IMAGES else "series.onnx")


def data(name):
    return (IMAGES | SERIES)[name]()


# --- methods without training, by ctonnx.probe


def probed(name, seeds, betas):
    """Rows of linear probing and S-CT, and rows of the curve over β."""
    train, test = data(name)
    plain, plain_right = _probe(network(name), train, test, "1", seeds)
    best, _ = _probe(network(name), train, test, betas, seeds)
    rows = [
        _row(name, PROBED, seed, plain.original.test, plain.parameters, 0, "", plain_right)
        for seed in range(seeds)
    ]
    for seed in best.seeds:
        chosen = f"{seed.beta:g}"
        row = _row(name, "S-CT", seed.seed, seed.test, best.parameters, 1, chosen)
        # The interval is paired over the test samples, with each seed at the beta that it chose.
        rows.append({**row, "gain_half": best.gain_high - best.gain})
    curve = [
        {"data": name, "beta": f"{p.beta:g}", "validation": p.validation, "test": p.test}
        for p in best.points
    ]
    return rows, curve


def _probe(path, train, test, betas, seeds):
    """The probe, and which test samples its model gets right in plain ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ctonnx.probe(path, train, test, betas, seeds=seeds)
    right = _outputs(result.model, test[0]).argmax(1) == test[1]
    assert right.mean() == result.written == result.best.test, (path, betas)
    return result, right


def _outputs(model, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": inputs})[0]


# --- methods that train a head, and T-CT's pairs or LoRA's matrices


def trained(name, method, seed, steps, rates):
    """The row of a method that trains, with the rate chosen on a validation split."""
    train, test = data(name)
    classes = int(train[1].max()) + 1
    whole = tuple(torch.from_numpy(array) for array in train)
    fit, validation = train_test_split(
        np.arange(len(train[1])), test_size=VALIDATION, stratify=train[1], random_state=seed
    )
    scores = {}
    if len(rates) > 1:
        for rate in rates:
            model = _fitted(name, method, classes, seed, [part[fit] for part in whole], steps, rate)
            scores[rate] = _score(model, *(part[validation] for part in whole))
    rate = max(rates, key=lambda rate: scores.get(rate, (0, 0)))
    model = _fitted(name, method, classes, seed, whole, steps, rate)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    head = (64 + 1) * classes
    if method == "LoRA":
        model = model.merge_and_unload()
    with torch.no_grad():
        expected = model(torch.from_numpy(test[0])).argmax(1).numpy() == test[1]
    right = _outputs(_exported(model, method, whole[0][:2]), test[0]).argmax(1) == test[1]
    chosen = f"{rate:g}" if rate else ""
    row = _row(name, method, seed, right.mean(), head, sum(sizes) - head, chosen, right)
    return {**row, "pytorch": float(expected.mean())}


def _fitted(name, method, classes, seed, samples, steps, rate):
    """The network with a new head, trained with the method's parameters; the rest stays frozen."""
    inputs, labels = samples
    model = pretrain.load(network(name)).requires_grad_(False)
    torch.manual_seed(seed)
    # The same head for all methods; like that of probe, it standardizes the features.
    model.head = nn.Sequential(
        nn.BatchNorm1d(64, 1e-3, momentum=1.0, affine=False), nn.Linear(64, classes)
    )
    if method == "T-CT":
        model = trainable(model, inputs[:2])
    elif method == "LoRA":
        model = _with_lora(model)
    # Only the head has a normalization. It takes the mean and deviation of the features before
    # training and keeps them.
    with torch.no_grad():
        model.train()(inputs)
    model.eval()
    trainable_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable_parameters.items() if "head" in n]
    added = [p for n, p in trainable_parameters.items() if "head" not in n]
    groups = [{"params": head, "lr": HEAD_RATE}]
    if added:
        groups.append({"params": added, "lr": rate})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for batch in _batches(len(labels), steps, generator):
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _with_lora(model):
    """LoRA of rank 1 and alpha 1 at every convolution, as in the paper's code."""
    from peft import LoraConfig, get_peft_model

    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=convolutions, modules_to_save=["head"])
    return get_peft_model(model, config)


def _batches(count, steps, generator):
    while steps:
        for batch in torch.randperm(count, generator=generator).split(BATCH)[:steps]:
            steps -= 1
            yield batch


def _score(model, inputs, labels):
    """Accuracy, and the negative loss to break ties."""
    with torch.no_grad():
        logits = model(inputs)
    loss = F.cross_entropy(logits, labels).nan_to_num(float("inf"))
    return (logits.argmax(1) == labels).float().mean().item(), -loss.item()


def _exported(model, method, example):
    options = {
        "input_names": ["input"],
        "output_names": ["logits"],
        "dynamic_shapes": {"x": {0: torch.export.Dim("batch")}},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "T-CT":
            return export(model, (example,), **options)
        return torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, **options
        ).model_proto


# --- all runs


def _row(name, method, seed, accuracy, head, added, chosen, right=None):
    return {
        "data": name,
        "method": method,
        "seed": seed,
        "accuracy": float(accuracy),
        "head": head,
        "added": added,
        "chosen": chosen,
        "pytorch": "",
        "right": right,
    }


def _prepare():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Silence the exporter's messages about itself.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _job(job):
    function, *args = job
    return function(*args)


def run(names, seeds, betas, steps, rates, workers=2):
    """All rows, and the rows of the curves; the same for any number of workers."""
    jobs = [
        (trained, n, m, s, steps, rates[m]) for n in names for s in range(seeds) for m in TRAINED
    ]
    jobs = [(probed, n, seeds, betas) for n in names] + jobs
    rows, curves = [], []
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare) as pool:
        for i, (job, result) in enumerate(zip(jobs, pool.map(_job, jobs), strict=True), 1):
            print(f"{i}/{len(jobs)} {job[1]}", end="\r", flush=True)
            if job[0] is probed:
                rows += result[0]
                curves += result[1]
            else:
                rows.append(result)
    print()
    order = {name: i for i, name in enumerate([*names, *METHODS])}
    rows.sort(key=lambda row: (order[row["data"]], order[row["method"]], row["seed"]))
    return rows, curves


# --- results


def summarized(rows):
    """Summarize the seeds.

    Returns:
        (data, method) -> a dict of the mean accuracy over the seeds and half of its 95 % interval,
        the values chosen, the parameters of the head and beyond it, and the gain over linear
        probing with half of its 95 % interval, paired over the test samples.
    """
    groups = {}
    for row in rows:
        groups.setdefault((row["data"], row["method"]), []).append(row)
    summary = {}
    for (name, method), group in groups.items():
        accuracies = np.array([row["accuracy"] for row in group])
        count = len(accuracies)
        half = quantile(0.975, count - 1) * accuracies.std(ddof=1) / count**0.5 if count > 1 else 0
        plain = groups[name, PROBED][0]["right"]
        if method == "S-CT":
            gain_half = group[0]["gain_half"]
        else:
            scores = np.mean([row["right"] for row in group], axis=0) - plain
            error = scores.std(ddof=1) / len(scores) ** 0.5
            gain_half = quantile(0.975, len(scores) - 1) * error
        summary[name, method] = {
            "accuracy": accuracies.mean(),
            "half": half,
            "chosen": [row["chosen"] for row in group],
            "head": group[0]["head"],
            "added": group[0]["added"],
            "gain": accuracies.mean() - plain.mean(),
            "gain_half": gain_half,
        }
    return summary


def relative(summary, names, method, baseline):
    """The mean relative gain over `baseline` in per cent, computed as in the paper's code."""
    pairs = [(summary[n, method]["accuracy"], summary[n, baseline]["accuracy"]) for n in names]
    return 100 * np.mean([(accuracy - base) / base for accuracy, base in pairs])


def table(summary, names, machine):
    lines = [
        "| data | " + " | ".join(METHODS) + " | β of S-CT |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for name in names:
        cells = [
            f"{summary[name, m]['accuracy']:.3f}"
            + (f" ± {summary[name, m]['half']:.3f}" if m != PROBED else "")
            for m in METHODS
        ]
        betas = ", ".join(summary[name, "S-CT"]["chosen"])
        lines.append(f"| {name} | {' | '.join(cells)} | {betas} |")
    means = [np.mean([summary[n, m]["accuracy"] for n in names]) for m in METHODS]
    lines.append(f"| **mean** | {' | '.join(f'**{mean:.3f}**' for mean in means)} | |")
    lines += [
        "",
        "| | beyond the head | over linear probing | over the gradient head | over LoRA"
        " | better, equal, worse than linear probing |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        added = sorted({summary[n, method]["added"] for n in names})
        gains = [
            "" if over == method else f"{relative(summary, names, method, over):+.2f} %"
            for over in (PROBED, PLAIN, "LoRA")
        ]
        signs = [np.sign(round(summary[n, method]["gain"], 9)) for n in names]
        counts = ", ".join(str(signs.count(sign)) for sign in (1, 0, -1))
        counts = "" if method == PROBED else counts
        size = " or ".join(f"{number:,}" for number in added)
        lines.append(f"| {method} | {size} | {' | '.join(gains)} | {counts} |")
    return "\n".join([*lines, "", machine, ""])


def machine(seconds):
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    packages = ("torch", "onnxruntime", "scikit-learn", "numpy", "aeon", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{seconds / 60:.0f} minutes on {os.cpu_count()} cores of {model}, "
        f"Python {platform.python_version()}, {versions}."
    )


def draw(summary, curves, names):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    gains, betas = figure.subplots(1, 2)
    others = METHODS[1:]
    for i, method in enumerate(others):
        at = np.arange(len(names)) + (i - (len(others) - 1) / 2) * 0.18
        values, halves = (
            [100 * summary[n, method][key] for n in names] for key in ("gain", "gain_half")
        )
        gains.errorbar(values, at, xerr=halves, fmt="o", ms=4, lw=1, label=method)
    gains.axvline(0, color="gray", lw=1)
    gains.set_yticks(range(len(names)), names)
    gains.invert_yaxis()
    gains.set_xlabel("points of accuracy over linear probing, 95 % over test samples")
    gains.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(others), fontsize="small")
    styles = ("-", "--")
    for i, name in enumerate(names):
        points = sorted((float(p["beta"]), p["test"]) for p in curves if p["data"] == name)
        x, y = np.array(points).T
        label = {"color": f"C{i % 10}", "ls": styles[i // 10], "label": name}
        betas.plot(x, 100 * (y - y[-1]), lw=1.2, **label)
    betas.axhline(0, color="gray", lw=1)
    betas.set_xlabel("β")
    betas.set_ylabel("points of test accuracy over β = 1")
    betas.legend(fontsize="x-small", ncols=2)
    return figure


def _csv(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write(folder, rows, curves, names, seconds):
    """Write all files, each atomically, once everything is computed."""
    summary = summarized(rows)
    hidden = ("right", "gain_half")
    plain = [{key: row[key] for key in row if key not in hidden} for row in rows]
    buffer = io.BytesIO()
    draw(summary, curves, names).savefig(buffer, format="png", dpi=120)
    contents = {
        "results.csv": _csv(plain).encode(),
        "curves.csv": _csv(curves).encode(),
        "table.md": table(summary, names, machine(seconds)).encode(),
        "transfer.png": buffer.getvalue(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        aside = folder / f".{name}"
        aside.write_bytes(content)
        aside.replace(folder / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run three data sets briefly")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.quick and args.out == HERE:
        parser.error("--quick needs another --out: the committed files come from the full run")
    start = time.perf_counter()
    names = QUICK if args.quick else (*IMAGES, *SERIES)
    if args.quick:
        few = {method: rates[len(rates) // 2 :][:1] for method, rates in RATES.items()}
        rows, curves = run(names, 1, "0.8:1:0.1", 40, few)
    else:
        rows, curves = run(names, 3, "0.7:1:0.01", 200, RATES)
    write(args.out, rows, curves, names, time.perf_counter() - start)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
