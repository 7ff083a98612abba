// The reader of 8 by 8 digits: a drawing, and how likely it is each digit.

import { color, percent, prepare } from "./canvas.js";
import { Corrections } from "./corrections.js";
import { Model, ORIGINAL } from "./model.js";

const SIDE = 8;
const PIXELS = SIDE * SIDE;
const FULL = 16; // Ink of a pixel is 0 to 16, as in the data set.
const CHUNK = 60;

export class Digits {
  static async load(data, changed) {
    const view = new Digits(await Model.load("digits.onnx"), data, changed);
    view.#takeExample(0);
    return view;
  }

  // `changed` is called when there is another drawing.
  constructor(model, data, changed) {
    this.model = model;
    this.changed = changed;
    this.canvas = document.getElementById("drawing");
    this.figures = document.getElementById("digits-figures");
    this.pixels = Uint8Array.from(atob(data.pixels), (letter) => letter.charCodeAt(0));
    this.labels = data.labels;
    this.blur = data.blur;
    this.corrections = new Corrections(data.corrections);
    this.ink = new Float32Array(PIXELS);
    this.cursor = null; // Of the keyboard, the pixel's number.
    this.taken = Array(10).fill(0);
    this.bars = Array.from({ length: 10 }, (_, digit) => this.#bar(digit));
    this.#listen();
  }

  #bar(digit) {
    const item = document.createElement("li");
    item.innerHTML =
      `<span>${digit}</span><span class="track" aria-hidden="true"><span class="fill"></span>` +
      `<span class="mark"></span></span><span></span>`;
    item.querySelector(".fill").style.display = "block";
    document.getElementById("probabilities").append(item);
    return item;
  }

  #listen() {
    const examples = document.getElementById("examples");
    for (let digit = 0; digit < 10; digit++) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = digit;
      button.ariaLabel = `Example of a ${digit}`;
      button.addEventListener("click", () => this.#takeExample(digit));
      examples.append(button);
    }
    document.getElementById("clear").addEventListener("click", () => this.#clear());

    let last = null; // Where the pen was, in pixels; null while it is up.
    const position = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top].map((v) => (v / box.width) * SIDE);
    };
    const draw = (event) => {
      const next = position(event);
      const length = Math.hypot(next[0] - last[0], next[1] - last[1]);
      const steps = Math.ceil(length / 0.2) || 1;
      for (let i = 1; i <= steps; i++) {
        this.#press(...last.map((v, axis) => v + (i / steps) * (next[axis] - v)));
      }
      last = next;
      this.changed();
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      last = position(event);
      draw(event);
    });
    this.canvas.addEventListener("pointermove", (event) => last && draw(event));
    for (const end of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(end, () => (last = null));
    }
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("blur", () => {
      this.cursor = null;
      this.changed();
    });
  }

  // A round pen: full ink within a third of a pixel of its middle, none from one pixel on.
  #press(x, y) {
    for (let k = 0; k < PIXELS; k++) {
      const distance = Math.hypot((k % SIDE) + 0.5 - x, ((k / SIDE) | 0) + 0.5 - y);
      const covered = Math.min(1, Math.max(0, (1.05 - distance) / 0.7));
      this.ink[k] = Math.max(this.ink[k], Math.round(FULL * covered));
    }
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const at = this.cursor ?? 0;
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const within = (v) => Math.min(SIDE - 1, Math.max(0, v));
      this.cursor =
        this.cursor === null ? 0 : within(((at / SIDE) | 0) + y) * SIDE + within((at % SIDE) + x);
    } else if (event.key === " " || event.key === "Enter") {
      this.cursor = at;
      this.ink[at] = this.ink[at] ? 0 : FULL;
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.#clear();
    } else {
      return;
    }
    event.preventDefault();
    const k = this.cursor ?? 0;
    document.getElementById("pixel").textContent =
      `Row ${((k / SIDE) | 0) + 1}, column ${(k % SIDE) + 1}, ` +
      `ink ${percent(this.ink[k] / FULL, 0)}`;
    this.changed();
  }

  #clear() {
    this.ink.fill(0);
    this.changed();
  }

  // The next held-out image of a digit.
  #takeExample(digit) {
    const images = [...this.labels.keys()].filter((i) => this.labels[i] === digit);
    const i = images[this.taken[digit]++ % images.length];
    this.ink.set(this.pixels.subarray(i * PIXELS, (i + 1) * PIXELS));
    this.changed();
  }

  // The logits of digits with the ink `pixels`, which are blurred first if they are to be.
  async #logits(pixels, { blurred, recalibrated, ...parameters }) {
    const seen = blurred ? blur(pixels, this.blur) : pixels;
    const scaled = Float32Array.from(seen, (v) => v / FULL);
    const kind = recalibrated ? (blurred ? "blurred" : "sharp") : null;
    const more = this.corrections.feeds(parameters, kind);
    return this.model.run(scaled, [pixels.length / PIXELS, 1, SIDE, SIDE], parameters, more);
  }

  async compute(parameters) {
    const { blurred } = parameters;
    this.seen = blurred ? blur(this.ink, this.blur) : this.ink;
    this.values = await this.#logits(this.ink, parameters);
    this.original = await this.#logits(this.ink, { ...ORIGINAL, blurred });
  }

  draw() {
    const { context, width } = prepare(this.canvas);
    const cell = width / SIDE;
    context.fillStyle = color("ink");
    const edge = (i) => Math.round(i * cell); // Between pixels of the screen there would be seams.
    this.seen.forEach((v, k) => {
      const [x, y] = [k % SIDE, (k / SIDE) | 0];
      context.globalAlpha = v / FULL;
      context.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
    });
    context.globalAlpha = 1;
    if (this.cursor !== null) {
      context.strokeStyle = color("one");
      context.lineWidth = 3;
      const corner = [(this.cursor % SIDE) * cell, ((this.cursor / SIDE) | 0) * cell];
      context.strokeRect(corner[0] + 1.5, corner[1] + 1.5, cell - 3, cell - 3);
    }
    const [now, before] = [softmax(this.values), softmax(this.original)];
    const [read, readBefore] = [now, before].map((p) => p.indexOf(Math.max(...p)));
    this.bars.forEach((bar, digit) => {
      bar.querySelector(".fill").style.width = `${100 * now[digit]}%`;
      bar.querySelector(".mark").style.left = `${100 * before[digit]}%`;
      bar.querySelector(".mark").hidden = before[digit] < 0.005;
      bar.lastElementChild.textContent = percent(now[digit], 0);
      bar.classList.toggle("most", digit === read);
    });
    this.figures.textContent = this.ink.some(Boolean)
      ? `Reads ${read}, ${percent(now[read], 0)} sure ` +
        `(${readBefore}, ${percent(before[readBefore], 0)} by the original)`
      : "Draw a digit, or take an example";
    this.summary = `Digit: ${this.figures.textContent}.`;
  }

  // How many of the held-out digits are read right; null where `stale` tells to stop.
  async countRight(parameters, stale) {
    let right = 0;
    for (let first = 0; first < this.labels.length; first += CHUNK) {
      const labels = this.labels.slice(first, first + CHUNK);
      const pixels = this.pixels.subarray(first * PIXELS, (first + labels.length) * PIXELS);
      const logits = await this.#logits(pixels, parameters);
      labels.forEach((label, i) => {
        const row = logits.subarray(10 * i, 10 * i + 10);
        right += row.indexOf(Math.max(...row)) === label;
      });
      await new Promise((resume) => setTimeout(resume)); // Let the sliders have their turn.
      if (stale()) return null;
    }
    return right;
  }
}

// Images of 8 by 8, one after another, each blurred along both axes by a matrix of 8 by 8.
function blur(images, matrix) {
  const result = new Float32Array(images.length);
  for (let first = 0; first < images.length; first += PIXELS) {
    const image = images.subarray(first, first + PIXELS);
    const at = (row, column) => image[row * SIDE + column];
    const across = product((row, k) => matrix[row][k], at);
    result.set(product((row, k) => across[row * SIDE + k], (k, column) => matrix[column][k]), first);
  }
  return result;
}

// The product of two matrices of 8 by 8, given as functions of row and column.
function product(left, right) {
  return Float32Array.from({ length: PIXELS }, (_, place) => {
    const [row, column] = [(place / SIDE) | 0, place % SIDE];
    let sum = 0;
    for (let k = 0; k < SIDE; k++) sum += left(row, k) * right(k, column);
    return sum;
  });
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (v) => Math.exp(v - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((v) => v / sum);
}
