// Steps, noise, blend, seed, size: each answers at once, and is sent when it comes to rest.

import { $, icon, make } from "./dom.js";

const CHUNK_FRAMES = 4;

function slider(label, low, high, range, show) {
  const input = make("input", { type: "range", ...range, "aria-label": label });
  const value = make("output", {});
  const ends = make("div", { class: "ends" }, make("span", {}, low), value, make("span", {}, high));
  const paint = () => {
    const part = (input.value - input.min) / (input.max - input.min);
    // The thumb's middle runs from 10 px to the width less 10.
    input.style.setProperty("--part", `calc(10px + ${part} * (100% - 20px))`);
    value.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", show(Number(input.value)));
  };
  input.addEventListener("input", paint);
  paint();
  return { input, paint, element: make("div", { class: "dial" }, ends, input) };
}

/** The dials in ``#dials``. ``now()`` gives the focused Stream or null; ``refused(error)`` is told when a change is. */
export class Dials {
  constructor({ now, refused, resize }) {
    this.now = now;
    this.refused = refused;
    this.steps = slider("Steps: faster or finer", "faster", "finer", { min: 1, max: 4, step: 1, value: 2 }, (v) => `${v} step${v > 1 ? "s" : ""}`);
    this.noise = slider("Noise: faithful or free", "faithful", "free", { min: 0, max: 1, step: 0.05, value: 0.8 }, (v) => v.toFixed(2));
    this.blending = slider("Blend: how long a new prompt fades in", "cut", "blend", { min: 0, max: 6, step: 0.25, value: 1 }, (v) => `${v.toFixed(1)} s`);
    this.seed = make("input", { class: "num", type: "number", min: 0, max: 2 ** 31 - 1, step: 1, value: 0, "aria-label": "Seed" });
    const dice = make("button", { class: "icon", type: "button", "aria-label": "Another seed", title: "Another seed" }, icon("dice"));
    this.size = make("select", { "aria-label": "Size" });
    const seedDial = make("div", { class: "dial" }, make("div", { class: "ends" }, make("span", {}, "seed")), make("div", { class: "inline" }, this.seed, dice));
    const sizeDial = make("div", { class: "dial pick" }, make("div", { class: "ends" }, make("span", {}, "size")), this.size);
    $("dials").append(this.steps.element, this.noise.element, this.blending.element, seedDial, sizeDial);

    this.steps.input.onchange = () => this.send({ steps: Number(this.steps.input.value) });
    this.noise.input.onchange = () => {
      this.noise.touched = true;
      this.send({ noise: Number(this.noise.input.value) });
    };
    this.seed.onchange = () => this.seed.reportValidity() && this.send({ seed: Number(this.seed.value) });
    dice.onclick = () => {
      this.seed.value = Math.floor(Math.random() * 100_000);
      this.send({ seed: Number(this.seed.value) });
    };
    this.size.onchange = () => {
      this.size.chosen = true; // until then each source has the size that suits it
      const [width, height] = this.size.value.split("×").map(Number);
      const stream = this.now();
      if (height && stream && !stream.ended) this.send({ width, height });
      else resize();
    };
  }

  /** Chunks over which a new prompt fades in, at the stream's rate. */
  blendChunks() {
    const fps = this.now()?.stats?.fps || 16;
    return Math.min(64, Math.round((Number(this.blending.input.value) * fps) / CHUNK_FRAMES));
  }

  /** What a new stream starts with. */
  spec() {
    const [width, height] = this.size.chosen ? this.size.value.split("×").map(Number) : [];
    return {
      steps: Number(this.steps.input.value),
      ...(this.noise.touched ? { noise: Number(this.noise.input.value) } : {}), // else the model's own
      seed: Number(this.seed.value) || 0,
      ...(height ? { width, height } : {}),
    };
  }

  /** The sizes to offer: [width, height] pairs. */
  offer(sizes, now = "") {
    this.size.replaceChildren(new Option("as it fits", ""), ...sizes.map(([w, h]) => new Option(`${w}×${h}`)));
    this.size.value = now;
  }

  /** Show what a stream runs with, except where the user is turning right now. */
  show(view) {
    const set = (dial, value) => {
      if (value == null || document.activeElement === dial.input || Number(dial.input.value) === value) return;
      dial.input.value = value;
      dial.paint();
    };
    set(this.steps, view.steps);
    set(this.noise, view.noise);
    if (document.activeElement !== this.seed && view.seed != null) this.seed.value = view.seed;
    const size = view.width ? `${view.width}×${view.height}` : "";
    if (size && document.activeElement !== this.size && this.size.value !== size) {
      if (![...this.size.options].some((option) => option.value === size)) this.size.add(new Option(size));
      this.size.value = size;
    }
  }

  async send(changes) {
    const stream = this.now();
    if (!stream || stream.ended) return;
    try {
      await stream.patch(changes);
    } catch (error) {
      this.refused(error);
      this.show(stream.view);
    }
  }
}
