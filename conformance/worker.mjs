// ONNX Runtime's JavaScript builds behind the protocol of worker.py: `answer` is used by the page that
// serves onnxruntime-web, and by Node, where this file is the worker.

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };
const TO_BYTES = (array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

let opened, session;

// `load` makes of a job's model what InferenceSession.create takes.
export async function answer(ort, job, load) {
  try {
    if (opened !== job.model) {
      opened = undefined;
      session = await ort.InferenceSession.create(await load(job.model));
      opened = job.model;
    }
    const feeds = {};
    for (const [name, [type, shape, data]] of Object.entries(job.inputs)) {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      feeds[name] = new ort.Tensor(type, new ARRAYS[type](bytes.buffer), shape);
    }
    const outputs = {};
    for (const [name, tensor] of Object.entries(await session.run(feeds))) {
      let letters = "";
      for (const byte of TO_BYTES(tensor.data)) letters += String.fromCharCode(byte);
      outputs[name] = [tensor.type, tensor.dims, btoa(letters)];
    }
    return { outputs };
  } catch (error) {
    return { error: String(error) };
  }
}

if (typeof process !== "undefined") {
  const { createRequire } = await import("node:module");
  const { createInterface } = await import("node:readline");
  const ort = createRequire(`${process.argv[2]}/`)("onnxruntime-node");
  for await (const line of createInterface({ input: process.stdin })) {
    process.stdout.write(`${JSON.stringify(await answer(ort, JSON.parse(line), (path) => path))}\n`);
  }
}
