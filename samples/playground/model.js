// A steered ONNX model with the inputs beta and coeff, run by onnxruntime-web.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

// Threads would need headers of the server's, and the networks are small.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = {
  wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href,
};

let last = Promise.resolve(); // Runs must not overlap: their sessions share one memory.

export class Model {
  static async load(file) {
    return new Model(await ort.InferenceSession.create(new URL(file, import.meta.url).href));
  }

  constructor(session) {
    this.session = session;
  }

  // The output, a Float32Array, for an input of the shape `dims` as a Float32Array. `more` are the
  // model's other inputs but β and c: name -> [data, dims].
  run(data, dims, parameters, more = {}) {
    const result = last.then(() => this.#run(data, dims, parameters, more));
    last = result.catch(() => {});
    return result;
  }

  async #run(data, dims, { beta, coeff }, more) {
    const given = ["beta", "coeff", ...Object.keys(more)];
    const [input] = this.session.inputNames.filter((name) => !given.includes(name));
    const fed = {
      ...more,
      [input]: [data, dims],
      beta: [Float32Array.of(beta), []],
      coeff: [Float32Array.of(coeff), []],
    };
    const tensors = Object.entries(fed).map(([name, of]) => [name, new ort.Tensor("float32", ...of)]);
    const results = await this.session.run(Object.fromEntries(tensors));
    return results[this.session.outputNames[0]].data;
  }
}

// What the pictures are compared with: at beta 1 c does not matter.
export const ORIGINAL = { beta: 1, coeff: 0.5, recalibrated: false };
