"""Draw how beta bends a decision boundary and a regression curve: the paper's first figure.

The script runs the playground's two ONNX models in ONNX Runtime at c = 0.5 and several values of
beta, prints a table, and writes boundary.png and the animation boundary.gif into docs/images.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import ctonnx

HERE = Path(__file__).resolve().parent
PLAYGROUND = HERE.parent / "playground"
COEFF = 0.5
TABLE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
SHOWN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FRAMES = np.linspace(1.0, 0.5, 21)

SIDE, REACH = 241, 4.8  # points along a side of the plane, and its largest coordinate
STEP, FINE = 0.1, 5  # length of a piece of the boundary or curve, and offsets to start pieces at
ARMS = ("#0b66b0", "#b9500a")
FIELDS = ("#d3e5f5", "#f9dfc8")


class Network:
    """A steered model with the inputs x, beta and coeff, and one output."""

    def __init__(self, name):
        self.session = ctonnx.session(PLAYGROUND / f"{name}.onnx")

    def __call__(self, x, beta):
        """The output of each row of x: (rows, inputs) -> (rows,)."""
        feeds = {"x": x, "beta": np.asarray(beta), "coeff": np.asarray(COEFF)}
        feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
        return self.session.run(None, feeds)[0][:, 0]


class Spiral:
    def __init__(self, data):
        self.points, self.arms = np.array(data["points"]), np.array(data["arms"])
        self.test_points, self.test_arms = np.array(data["held_points"]), data["held_arms"]
        self.network = Network("spiral")
        self.axis = np.linspace(-REACH, REACH, SIDE)
        self.grid = np.stack(np.meshgrid(self.axis, self.axis), -1).reshape(-1, 2)

    def scores(self, beta):
        return self.network(self.grid, beta).reshape(SIDE, SIDE)

    def accuracy(self, beta):
        return np.mean((self.network(self.test_points, beta) > 0) == self.test_arms)

    def sharpest(self, beta):
        """The largest turn in degrees between neighbouring pieces, 0.1 long, of the boundary."""
        lines = Figure().add_subplot().contour(self.axis, self.axis, self.scores(beta), [0.0])
        turns = []
        for line in lines.allsegs[0]:
            along = np.r_[0, np.cumsum(np.hypot(*np.diff(line, axis=0).T))]
            at = np.arange(0, along[-1], STEP / FINE)
            x, y = (np.interp(at, along, column) for column in line.T)
            angles = np.arctan2(y[FINE:] - y[:-FINE], x[FINE:] - x[:-FINE])
            turn = np.exp(1j * (angles[FINE:] - angles[:-FINE]))
            turns.append(np.abs(np.angle(turn)).max(initial=0))
        return np.degrees(max(turns))

    def draw(self, axes, beta):
        scores = self.scores(beta)
        axes.contourf(self.axis, self.axis, scores, [-np.inf, 0, np.inf], colors=FIELDS)
        axes.contour(self.axis, self.axis, scores, [0.0], colors="#1c2230", linewidths=1.5)
        for arm, marker in enumerate("o^"):
            of_arm = self.points[self.arms == arm]
            axes.scatter(*of_arm.T, s=5, color=ARMS[arm], marker=marker, linewidths=0)
        axes.set(aspect="equal", xlabel=f"{100 * self.accuracy(beta):.1f} % of new points right")


class Curve:
    def __init__(self, data):
        self.x, self.y = data["x"], data["y"]
        self.line, self.truth = np.array(data["line"]), np.array(data["curve"])
        self.network = Network("regression")

    def fit(self, beta):
        return self.network(self.line[:, None], beta)

    def error(self, beta):
        return np.mean((self.fit(beta) - self.truth) ** 2)

    def sharpest(self, beta):
        """The largest change of slope between neighbouring pieces, 0.1 wide, of the curve."""
        first, last = self.line[[0, -1]]
        x = np.arange(first, last, STEP / FINE)
        y = self.network(x[:, None], beta)
        slopes = (y[FINE:] - y[:-FINE]) / STEP
        return np.abs(slopes[FINE:] - slopes[:-FINE]).max()

    def draw(self, axes, beta):
        axes.plot(self.line, self.truth, "--", color=ARMS[1], linewidth=1.2)
        axes.plot(self.line, self.fit(beta), color=ARMS[0], linewidth=1.8)
        axes.scatter(self.x, self.y, s=6, color="#1c2230", linewidths=0, zorder=3)
        axes.set(ylim=(-2.5, 2.5), xlabel=f"squared error {self.error(beta):.3f}")


def figure(views, betas, size):
    """A Figure with a row for each view and a column for each beta."""
    result = Figure(figsize=size, layout="constrained")
    grid = result.subplots(len(views), len(betas), squeeze=False)
    for row, view in zip(grid, views, strict=True):
        for axes, beta in zip(row, betas, strict=True):
            view.draw(axes, beta)
            axes.set(xticks=[], yticks=[])
            axes.xaxis.label.set_size(9)
            axes.spines[:].set_color("#dedbd3")
    for axes, beta in zip(grid[0], betas, strict=True):
        axes.set_title(f"β = {beta:.2f}" + (", ReLU" if beta == 1 else ""), fontsize=11)
    return result


def animate(views, path):
    """A GIF of beta from 1 to 0.5 and back."""
    images = []
    for beta in FRAMES:
        buffer = io.BytesIO()
        figure(views, [beta], (3.6, 6.2)).savefig(buffer, dpi=90)
        image = Image.open(buffer).convert("RGB")
        images.append(image.quantize(48, dither=Image.Dither.NONE))
    durations = [1200, *[120] * (len(images) - 2), 1200]
    images += images[-2:0:-1]
    durations += durations[-2:0:-1]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "docs" / "images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    data = json.loads((PLAYGROUND / "data.json").read_text())
    spiral, curve = Spiral(data["spiral"]), Curve(data["regression"])

    print("| β | new points right | sharpest turn | squared error | sharpest change of slope |")
    print("|---|---|---|---|---|")
    for beta in TABLE:
        row = f"| {beta:.2f} | {100 * spiral.accuracy(beta):.1f} % | {spiral.sharpest(beta):.0f}° "
        print(f"{row}| {curve.error(beta):.3f} | {curve.sharpest(beta):.2f} |")

    figure([spiral, curve], SHOWN, (13.5, 5)).savefig(out / "boundary.png", dpi=100)
    animate([spiral, curve], out / "boundary.gif")


if __name__ == "__main__":
    main()
