"""Draw the figure of method.md: `python docs/figures.py` writes ctu.svg beside this file."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from ctonnx.ctu import ctu

# Colors that are legible on a light page and on a dark one.
TEXT, AXIS = "#808890", "#80889060"


def main(path):
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "ctonnx", "font.family": "sans-serif"}
    )
    x = np.linspace(-2, 2, 201)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5), layout="constrained")
    colors = ("#808890", "#4f83cc", "#3fa796", "#d09a3c", "#cf6250")
    for beta, color in zip((1.0, 0.9, 0.8, 0.6, 0.0), colors, strict=True):
        left.plot(x, ctu(x, beta), color=color, label=f"β = {beta:g}", linewidth=2)
    left.set_title("β, with c = 0.5", color=TEXT)
    right.plot(x, ctu(x, 1.0), color=TEXT, label="ReLU", linewidth=2)
    for coeff, color in zip((0.0, 0.5, 1.0), ("#d09a3c", "#3fa796", "#4f83cc"), strict=True):
        right.plot(x, ctu(x, 0.6, coeff), color=color, label=f"c = {coeff:g}", linewidth=2)
    right.set_title("c, with β = 0.6", color=TEXT)
    for axes in left, right:
        axes.set(xlim=(-2, 2), ylim=(-0.35, 1.25), xlabel="x", xticks=range(-2, 3))
        axes.xaxis.label.set_color(TEXT)
        axes.tick_params(colors=TEXT)
        axes.grid(color=AXIS, linewidth=0.4)
        for spine in axes.spines.values():
            spine.set_color(AXIS)
        axes.legend(frameon=False, labelcolor=TEXT, loc="upper left")
        axes.patch.set_alpha(0)
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(__file__).with_name("ctu.svg"))
