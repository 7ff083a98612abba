// The network that follows forty noisy points of a curve.

import { color, prepare } from "./canvas.js";
import { Model, ORIGINAL } from "./model.js";

const HEIGHT = 2.5; // The picture goes from -HEIGHT to HEIGHT.

export class Regression {
  static async load(data) {
    const view = new Regression(await Model.load("regression.onnx"), data);
    view.original = await view.#fit(ORIGINAL);
    return view;
  }

  constructor(model, data) {
    this.model = model;
    this.data = data;
    this.canvas = document.getElementById("regression");
    this.figures = document.getElementById("regression-figures");
    this.inputs = new Float32Array(data.line);
  }

  async #fit(parameters) {
    return this.model.run(this.inputs, [this.inputs.length, 1], parameters);
  }

  async compute(parameters) {
    this.values = await this.#fit(parameters);
  }

  #error(values) {
    const squares = this.data.curve.map((y, i) => (values[i] - y) ** 2);
    return squares.reduce((sum, square) => sum + square) / squares.length;
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    const { line, curve, x, y } = this.data;
    const first = line[0];
    const last = line[line.length - 1];
    const column = (v) => 6 + ((v - first) / (last - first)) * (width - 12);
    const row = (v) => ((1 - v / HEIGHT) / 2) * height;
    const stroke = (values, style, thickness, dashes = []) => {
      context.beginPath();
      values.forEach((v, i) => context.lineTo(column(line[i]), row(v)));
      context.setLineDash(dashes);
      context.strokeStyle = color(style);
      context.lineWidth = thickness;
      context.stroke();
    };
    stroke(curve, "other", 1.75, [5, 4]);
    stroke(this.original, "muted", 1);
    stroke(this.values, "one", 2.75);
    context.fillStyle = color("ink");
    x.forEach((v, i) => {
      context.beginPath();
      context.arc(column(v), row(y[i]), 2.75, 0, 2 * Math.PI);
      context.fill();
    });

    const [error, before] = [this.#error(this.values), this.#error(this.original)];
    this.figures.textContent =
      `Squared error ${error.toFixed(3)} (${before.toFixed(3)} at β\u00a0=\u00a01)`;
    this.summary = `Curve: ${this.figures.textContent}.`;
    this.canvas.ariaLabel =
      `Noisy points, and the curve fitted to them beside the one without noise. ` +
      `${this.figures.textContent}.`;
  }
}
