// The classifier of two spiral arms: its score on a grid, and the line where that is 0.

import { channels, color, percent, prepare } from "./canvas.js";
import { Model, ORIGINAL } from "./model.js";

const SIDE = 100;
const REACH = 4.8; // The picture goes from -REACH to REACH.

export class Spiral {
  static async load(data) {
    const view = new Spiral(await Model.load("spiral.onnx"), data);
    view.original = await view.#scores(ORIGINAL);
    return view;
  }

  constructor(model, data) {
    this.model = model;
    this.data = data;
    this.canvas = document.getElementById("spiral");
    this.figures = document.getElementById("spiral-figures");
    this.field = new OffscreenCanvas(SIDE, SIDE);
    // The grid, rows from the top, then the points that the network was not trained on.
    const at = (i) => ((2 * i) / (SIDE - 1) - 1) * REACH;
    const grid = Array.from({ length: SIDE * SIDE }, (_, k) => [at(k % SIDE), -at((k / SIDE) | 0)]);
    this.inputs = new Float32Array([...grid, ...data.held_points].flat());
  }

  async #scores(parameters) {
    return this.model.run(this.inputs, [this.inputs.length / 2, 2], parameters);
  }

  async compute(parameters) {
    this.scores = await this.#scores(parameters);
  }

  get values() {
    return this.scores.subarray(0, SIDE * SIDE);
  }

  #accuracy(scores) {
    const right = (arm, i) => scores[SIDE * SIDE + i] > 0 === (arm === 1);
    return this.data.held_arms.filter(right).length / this.data.held_arms.length;
  }

  draw() {
    const { context, width } = prepare(this.canvas);
    this.#drawField(context, width);
    const cell = width / SIDE;
    const line = (scores, style, thickness, dashes) => {
      context.setLineDash(dashes);
      context.strokeStyle = style;
      context.lineWidth = thickness;
      context.stroke(contour(scores, cell));
    };
    line(this.original, color("muted"), 1.5, [3, 4]);
    line(this.scores, color("ink"), 2.5, []);
    context.setLineDash([]);
    this.#drawPoints(context, width);

    const accuracy = this.#accuracy(this.scores);
    const before = this.#accuracy(this.original);
    let moved = 0;
    for (let k = 0; k < SIDE * SIDE; k++) moved += this.scores[k] > 0 !== this.original[k] > 0;
    const share = percent(moved / (SIDE * SIDE));
    this.figures.textContent =
      `${percent(accuracy)} of new points right (${percent(before)} at β\u00a0=\u00a01)`;
    const changed = `${this.figures.textContent}. ${share} of the plane is on another side.`;
    this.summary = `Boundary: ${changed}`;
    this.canvas.ariaLabel = `Plane divided between two spiral arms. ${changed}`;
  }

  // One pixel for each value: the arms' colors, paler where the network is less sure.
  #drawField(context, width) {
    const page = channels(color("surface"));
    const sides = [channels(color("one-field")), channels(color("other-field"))];
    const image = new ImageData(SIDE, SIDE);
    for (let k = 0; k < SIDE * SIDE; k++) {
      const side = sides[this.scores[k] > 0 ? 1 : 0];
      const sure = 0.35 + 0.65 * Math.tanh(Math.abs(this.scores[k]) / 4);
      for (let i = 0; i < 3; i++) image.data[4 * k + i] = page[i] + sure * (side[i] - page[i]);
      image.data[4 * k + 3] = 255;
    }
    this.field.getContext("2d").putImageData(image, 0, 0);
    context.drawImage(this.field, 0, 0, width, width);
  }

  #drawPoints(context, width) {
    const size = Math.max(2.2, width / 180);
    const styles = [color("one"), color("other")];
    // A value stands for the middle of its pixel.
    const place = (v) => ((v / REACH + 1) / 2) * (width - width / SIDE) + width / SIDE / 2;
    context.strokeStyle = color("surface");
    context.lineWidth = 0.75;
    this.data.points.forEach(([x, y], i) => {
      const [column, row] = [place(x), place(-y)];
      context.beginPath();
      if (this.data.arms[i]) {
        context.moveTo(column, row - 1.3 * size);
        context.lineTo(column + 1.2 * size, row + 0.9 * size);
        context.lineTo(column - 1.2 * size, row + 0.9 * size);
        context.closePath();
      } else {
        context.arc(column, row, size, 0, 2 * Math.PI);
      }
      context.fillStyle = styles[this.data.arms[i]];
      context.fill();
      context.stroke();
    });
  }
}

// The line on which linearly interpolated scores are 0, as a Path2D: marching squares.
function contour(scores, cell) {
  const path = new Path2D();
  const middle = (i) => (i + 0.5) * cell;
  for (let row = 0; row < SIDE - 1; row++) {
    for (let column = 0; column < SIDE - 1; column++) {
      // Around the square: top left, top right, bottom right, bottom left.
      const corners = [[0, 0], [1, 0], [1, 1], [0, 1]];
      const values = corners.map(([x, y]) => scores[(row + y) * SIDE + column + x]);
      if (values.every((v) => v > 0) || values.every((v) => v <= 0)) continue;
      const crossings = [];
      for (let i = 0; i < 4; i++) {
        const j = (i + 1) % 4;
        if (values[i] > 0 === values[j] > 0) continue;
        const t = values[i] / (values[i] - values[j]);
        const along = (axis) => corners[i][axis] + t * (corners[j][axis] - corners[i][axis]);
        crossings.push([middle(column + along(0)), middle(row + along(1))]);
      }
      for (let i = 0; i < crossings.length; i += 2) {
        path.moveTo(...crossings[i]);
        path.lineTo(...crossings[i + 1]);
      }
    }
  }
  return path;
}
