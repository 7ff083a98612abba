// Run a steered model in onnxruntime-node. Its binding cannot register op libraries: the model runs
// through the function that it carries, so steer with the lowering `portable` or `primitives`.
//
// node serve.js MODEL FOLDER
const fs = require('node:fs');
const path = require('node:path');
const ort = require('onnxruntime-node');

function read(file) {
  const bytes = fs.readFileSync(file);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
}

async function main(model, folder, library) {
  if (library) throw new Error('onnxruntime-node cannot load an op library: leave it out');
  const session = await ort.InferenceSession.create(model);
  const images = new Float32Array(read(path.join(folder, 'images.f32')));
  const labels = new Uint8Array(read(path.join(folder, 'labels.u8')));
  for (const beta of [1, 0.7]) {
    const { logits } = await session.run({
      image: new ort.Tensor('float32', images, [labels.length, 1, 8, 8]),
      beta: new ort.Tensor('float32', [beta], []),
    });
    const right = labels.filter((label, n) => {
      const row = logits.data.subarray(10 * n, 10 * n + 10);
      return row.indexOf(Math.max(...row)) === label;
    });
    const accuracy = (right.length / labels.length).toFixed(4);
    const first = logits.data[0].toFixed(4);
    console.log(`beta ${beta.toFixed(2)}  accuracy ${accuracy}  first logit ${first}`);
  }
}

const [model, folder, library] = process.argv.slice(2);
if (!folder) {
  console.error('usage: serve.js MODEL FOLDER');
  process.exit(1);
}
main(model, folder, library).catch((error) => {
  console.error(`serve.js: ${error.message}`);
  process.exitCode = 1;
});
