// What recalibration makes of the outputs y of a network's layers: scale · y + shift per channel.

export class Corrections {
  // `inputs` are the names and shapes of scale and shift of each layer in turn. `sharp` and `blurred`
  // hold their numbers, one after another, at each c of `coeffs` for each β of `betas`, both rising.
  constructor({ inputs, betas, coeffs, sharp, blurred }) {
    this.inputs = inputs;
    this.betas = betas;
    this.coeffs = coeffs;
    this.values = { sharp: floats(sharp), blurred: floats(blurred) };
    this.length = this.values.sharp.length / betas.length / coeffs.length;
  }

  // Name -> [data, dims] of what to feed: that of digits of a `kind`, "sharp" or "blurred", between
  // the nearest β and c by linear interpolation; with `kind` null what changes nothing.
  feeds({ beta, coeff }, kind) {
    const numbers = kind === null ? null : this.#interpolated(beta, coeff, this.values[kind]);
    const fed = {};
    let first = 0;
    this.inputs.forEach(([name, dims], i) => {
      const length = dims.reduce((a, b) => a * b);
      const unchanged = i % 2 === 0 ? 1 : 0;
      const data = numbers
        ? numbers.slice(first, first + length)
        : new Float32Array(length).fill(unchanged);
      fed[name] = [data, dims];
      first += length;
    });
    return fed;
  }

  #interpolated(beta, coeff, values) {
    const numbers = new Float32Array(this.length);
    for (const [i, weight] of around(this.betas, beta)) {
      for (const [j, other] of around(this.coeffs, coeff)) {
        const start = (i * this.coeffs.length + j) * this.length;
        for (let k = 0; k < this.length; k++) numbers[k] += weight * other * values[start + k];
      }
    }
    return numbers;
  }
}

// The places in a rising `grid` on both sides of a value, each with its weight.
function around(grid, value) {
  const after = grid.findIndex((each, i) => i > 0 && each >= value);
  const weight = (value - grid[after - 1]) / (grid[after] - grid[after - 1]);
  return [
    [after - 1, 1 - weight],
    [after, weight],
  ];
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
