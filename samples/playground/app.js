// Controls, and the loop that computes and draws what they ask for.

import { Digits } from "./digits.js";
import { ORIGINAL } from "./model.js";
import { Regression } from "./regression.js";
import { Spiral } from "./spiral.js";

const element = (id) => document.getElementById(id);
const sliders = { beta: element("beta"), coeff: element("coeff") };
const switches = { recalibrated: element("recalibrated"), blurred: element("blurred") };
const status = element("status");

const views = {};
let wanted = 0; // Counts what was asked for,
let done = 0; // and what of it is drawn.
let since = null; // When the first input came that is not drawn yet.
let busy = false;
let quiet;
const originals = {}; // How many digits the original reads right, by whether they are blurred.

function parameters() {
  return {
    beta: sliders.beta.valueAsNumber,
    coeff: sliders.coeff.valueAsNumber,
    recalibrated: switches.recalibrated.checked,
    blurred: switches.blurred.checked,
  };
}

// Ask for a frame: as many inputs as come until it is drawn share it.
function change(event) {
  wanted++;
  since ??= event?.timeStamp ?? performance.now();
  if (!busy && views.digits) {
    busy = true;
    requestAnimationFrame(frame);
  }
}

async function frame() {
  const [number, started] = [wanted, since];
  since = null;
  const now = parameters();
  try {
    for (const view of Object.values(views)) await view.compute(now);
    showParameters(now);
    forgetCount(now);
    for (const view of Object.values(views)) view.draw();
  } catch (error) {
    fail(error);
    return;
  }
  done = number;
  requestAnimationFrame(() => {
    performance.measure("frame", { start: started, end: performance.now() });
    document.documentElement.dataset.drawn = done;
    busy = false;
    if (done !== wanted) {
      busy = true;
      frame();
    }
  });
  clearTimeout(quiet);
  quiet = setTimeout(() => settle(now), 350);
}

function showParameters({ beta, coeff }) {
  element("beta-value").textContent = beta.toFixed(3);
  element("coeff-value").textContent = coeff.toFixed(2);
  const original = beta === 1 ? ", the original network" : "";
  sliders.beta.setAttribute("aria-valuetext", `${beta.toFixed(3)}${original}`);
  sliders.coeff.setAttribute("aria-valuetext", coeff.toFixed(2));
}

// How many digits are read right at other parameters is not to stand beside these.
function forgetCount(now) {
  const { counted } = views.digits;
  if (counted && Object.keys(now).every((name) => counted[name] === now[name])) return;
  views.digits.counted = null;
  element("held-figures").textContent = "";
}

// Once nothing has moved for a while: say it to a screen reader, and count over all digits.
async function settle(now) {
  const said = Object.values(views).map((view) => view.summary).join(" ");
  element("summary").textContent = `β ${now.beta.toFixed(3)}, c ${now.coeff.toFixed(2)}. ${said}`;
  const number = wanted;
  const stale = () => number !== wanted;
  if (views.digits.counted) return;
  const { blurred } = now;
  const before = (originals[blurred] ??= await views.digits.countRight(
    { ...ORIGINAL, blurred },
    stale,
  ));
  const right = before === null ? null : await views.digits.countRight(now, stale);
  if (right === null) return;
  views.digits.counted = now;
  const what = `${views.digits.labels.length} new ${blurred ? "blurred digits" : "digits"}`;
  element("held-figures").textContent = `${right} of ${what} read right (${before} by the original)`;
}

function fail(error) {
  status.hidden = false;
  status.className = "failed";
  status.textContent = `The networks do not run here: ${error.message ?? error}`;
  console.error(error);
}

async function start() {
  const response = await fetch(new URL("data.json", import.meta.url));
  const data = await response.json();
  const spiral = await Spiral.load(data.spiral);
  const regression = await Regression.load(data.regression);
  const digits = await Digits.load(data.digits, change);
  Object.assign(views, { spiral, regression, digits });
  status.hidden = true;
  since = null;
  change();

  for (const control of Object.values({ ...sliders, ...switches })) {
    control.addEventListener("input", change);
  }
  element("reset").addEventListener("click", (event) => {
    sliders.beta.value = ORIGINAL.beta;
    sliders.coeff.value = ORIGINAL.coeff;
    for (const each of Object.values(switches)) each.checked = false;
    change(event);
  });
  const resized = new ResizeObserver(() => change());
  for (const { canvas } of Object.values(views)) resized.observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", change);
}

globalThis.playground = views; // For the console, and the tests.
start().catch(fail);
