// Draws digits with ONNX Runtime in the browser. Seeds draw the noise that dig_jax draws: JAX's Threefry.

const assets = new URL(".", import.meta.url);
const SIZE = 8, SCALE = 16;

/** Threefry-2x32 with 20 rounds (Salmon et al. 2011): two words from a key and a counter of two words. */
function threefry([k0, k1], [x0, x1]) {
  const keys = [k0, k1, k0 ^ k1 ^ 0x1bd11bda];
  const rotations = [[13, 15, 26, 6], [17, 29, 16, 24]];
  x0 = (x0 + keys[0]) | 0;
  x1 = (x1 + keys[1]) | 0;
  for (let i = 0; i < 5; i++) {
    for (const r of rotations[i % 2]) {
      x0 = (x0 + x1) | 0;
      x1 = ((x1 << r) | (x1 >>> (32 - r))) ^ x0;
    }
    x0 = (x0 + keys[(i + 1) % 3]) | 0;
    x1 = (x1 + keys[(i + 2) % 3] + i + 1) | 0;
  }
  return [x0, x1];
}

/** Inverse error function in single precision (Giles 2010), as XLA computes it. */
function erfinv(x) {
  let w = -Math.log1p(-x * x);
  const small = w < 5;
  w = small ? w - 2.5 : Math.sqrt(w) - 3;
  const coefficients = small
    ? [2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087, -0.00125372503, -0.00417768164, 0.246640727, 1.50140941]
    : [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047, 1.00167406, 2.83297682];
  return coefficients.reduce((p, c) => p * w + c) * x;
}

/** The noise of dig_jax.sampling.generate.noise([seed], 0, shape) with `count` elements. */
export function noise(seed, count) {
  const key = threefry(threefry([0, 0], [0, seed]), [0, 0]);
  const low = Math.fround(-1 + 2 ** -24);
  return Float32Array.from({ length: count }, (_, i) => {
    const [high, bits] = threefry(key, [0, i]);
    const unit = ((high ^ bits) >>> 9) / 2 ** 23;
    return Math.SQRT2 * erfinv(Math.max(low, Math.fround(Math.fround(unit * 2) + low)));
  });
}

/** The samplers of the page by their number of steps: flow matching, and MeanFlow. */
const FILES = { 20: "digits.onnx", 1: "digits_one_step.onnx" };

async function open(steps) {
  const ort = await import(new URL("ort.wasm.bundle.min.mjs", assets));
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", assets).href };
  ort.env.wasm.numThreads = 1; // threads need headers that plain servers do not send
  ort.env.logLevel = "error";
  // Optimizing the graph would take longer than drawing the first digits.
  const options = { graphOptimizationLevel: "disabled", logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(new URL(FILES[steps], assets).href, options);
  return { ort, session };
}

/** Return the image of a class and a seed: numbers from -1 to 1, row by row. */
async function sample({ ort, session }, label, seed) {
  const feeds = {
    labels: new ort.Tensor("int32", [label], [1]),
    noise: new ort.Tensor("float32", noise(seed, SIZE * SIZE), [1, SIZE, SIZE, 1]),
  };
  if (session.inputNames.includes("guidance_scale")) feeds.guidance_scale = new ort.Tensor("float32", [1], []);
  return (await session.run(feeds)).images.data;
}

/** Draw the image at a position of the canvas, which has room for `count` of them, five in a row. */
function draw(canvas, image, position, count) {
  const scale = count === 1 ? 2 * SCALE : SCALE, step = SIZE * scale + 8;
  if (position === 0) {
    canvas.width = Math.min(count, 5) * step - 8;
    canvas.height = Math.ceil(count / 5) * step - 8;
  }
  const context = canvas.getContext("2d"), left = (position % 5) * step, top = Math.floor(position / 5) * step;
  image.forEach((value, i) => {
    const gray = Math.round(Math.min(Math.max((value + 1) * 127.5, 0), 255));
    context.fillStyle = `rgb(${gray} ${gray} ${gray})`;
    context.fillRect(left + (i % SIZE) * scale, top + Math.floor(i / SIZE) * scale, scale, scale);
  });
}

async function start(page) {
  const [canvas, status] = [page.querySelector("canvas"), page.querySelector("output")];
  const [label, seed, steps, next] = ["label", "seed", "steps", "next"].map((name) => page.querySelector(`[name=${name}]`));
  const opened = performance.now(), models = {};
  let busy = false, again = false;
  async function update() {
    if (busy) return void (again = true);
    busy = true;
    do {
      again = false;
      const labels = label.value === "all" ? [...Array(10).keys()] : [Number(label.value)];
      const number = Math.min(Math.max(Math.trunc(Number(seed.value)) || 0, 0), 2 ** 31 - 1);
      const count = Number(steps.value);
      let model;
      try {
        model = await (models[count] ??= open(count));
      } catch (error) {
        status.textContent = `ONNX Runtime did not load: ${error.message}. This page needs a web server and a site that was built with it.`;
        return;
      }
      const began = performance.now();
      const images = [];
      for (const [position, one] of labels.entries()) {
        images.push(await sample(model, one, number));
        draw(canvas, images[position], position, labels.length);
        page.dataset.first ??= ((performance.now() - opened) / 1000).toFixed(2);
        await new Promise(requestAnimationFrame); // show it
      }
      const seconds = ((performance.now() - began) / 1000).toFixed(2);
      canvas.setAttribute("aria-label", `digits ${labels.join(", ")} of seed ${number}`);
      Object.assign(page.dataset, { images: images.map((x) => Array.from(x)).join(), state: `${labels.join()} ${number} ${count}` });
      status.textContent = `${labels.length === 1 ? "1 digit" : "10 digits"} in ${seconds} s, ${count === 1 ? "1 step" : `${count} steps`} each. The first one came ${page.dataset.first} s after loading began.`;
    } while (again);
    busy = false;
  }
  label.addEventListener("change", update);
  steps.addEventListener("change", update);
  seed.addEventListener("input", update);
  next.addEventListener("click", () => {
    seed.value = (Number(seed.value) || 0) + 1;
    update();
  });
  await update();
}

const page = globalThis.document?.getElementById("digits");
if (page) start(page);
