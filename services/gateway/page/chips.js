// Style chips: one press sends the style's prompt; each shows the user's own first frame in that style.

import { api } from "./api.js";
import { $, make } from "./dom.js";
import { KNOWN, drawStyle } from "./filters.js";
import { sceneCanvas } from "./scene.js";

const WIDTH = 96;
const HEIGHT = 60;
const PROMPTS = {
  pencil: "a pencil drawing",
  ink: "a black ink drawing",
  blueprint: "a blueprint drawing",
  neon: "neon lights",
  thermal: "a thermal camera",
  sepia: "a sepia photograph",
  "night vision": "night vision",
  comic: "a comic book",
  watercolour: "a watercolour painting",
  vaporwave: "vaporwave",
  "x-ray": "an x-ray",
  "pixel art": "pixel art",
  "pop art": "pop art",
  aurora: "aurora",
  "stained glass": "stained glass",
};

/** The chips in ``#chips``. ``choose(prompt, style)`` is called when one is pressed. */
export class Chips {
  constructor(choose) {
    this.choose = choose;
    this.box = $("chips");
    this.model = "";
    this.base = null;
    this.styles = [];
    this.box.addEventListener("keydown", (event) => this.move(event));
    this.show(KNOWN.map((name) => ({ name, prompt: PROMPTS[name] })));
  }

  /** Show the styles that ``model`` knows. */
  async load(model) {
    if (model === this.model) return;
    this.model = model;
    try {
      const { styles } = await api.styles(model);
      if (model !== this.model) return;
      const known = styles.filter(({ id }) => id !== "none" && id !== "no-style");
      if (known.length) this.show(known.map(({ name, prompt, thumbnail }) => ({ name, prompt, thumbnail })));
    } catch {
      // The built-in list stands: a style is only a prompt.
    }
  }

  show(styles) {
    if (JSON.stringify(styles) === JSON.stringify(this.styles)) return;
    this.styles = styles;
    this.chips = styles.map(({ name, prompt }, index) => {
      const canvas = make("canvas", { width: WIDTH, height: HEIGHT, "aria-hidden": "true" });
      const chip = make("button", { class: "chip", type: "button", "aria-pressed": "false", title: prompt }, canvas, make("span", {}, name));
      if (index < 9) chip.append(make("kbd", { "aria-hidden": "true" }, `${index + 1}`));
      chip.onclick = () => this.choose(prompt, name);
      return chip;
    });
    this.box.replaceChildren(...this.chips);
    this.draw();
  }

  /** Take the thumbnails' picture from a video or canvas. */
  from({ image, width, height }) {
    const canvas = make("canvas", { width: WIDTH, height: HEIGHT });
    const scale = Math.max(WIDTH / width, HEIGHT / height);
    const ctx = canvas.getContext("2d", { willReadFrequently: true });
    ctx.drawImage(image, (WIDTH - width * scale) / 2, (HEIGHT - height * scale) / 2, width * scale, height * scale);
    this.base = canvas;
    this.draw();
  }

  // A chip at a time between other work: fifteen small pictures take about 100 ms together.
  draw() {
    const base = (this.base ?? sceneCanvas(WIDTH, HEIGHT)).getContext("2d").getImageData(0, 0, WIDTH, HEIGHT);
    const queue = this.chips.map((chip, index) => [chip, this.styles[index]]);
    const mine = (this.drawing = Symbol("drawing"));
    const next = () => {
      const todo = queue.shift();
      if (!todo || mine !== this.drawing) return;
      const [canvas, { name, thumbnail }] = [todo[0].querySelector("canvas"), todo[1]];
      if (KNOWN.includes(name) || !thumbnail) canvas.getContext("2d").putImageData(drawStyle(name, base), 0, 0);
      else this.picture(canvas, thumbnail);
      setTimeout(next);
    };
    next();
  }

  // A style that we cannot draw ourselves is shown as its model's folder has it.
  async picture(canvas, path) {
    const image = await createImageBitmap(await api.blob(path)).catch(() => null);
    if (image) canvas.getContext("2d").drawImage(image, 0, 0, WIDTH, HEIGHT);
  }

  /** Light the chip of ``prompt``; ``waiting`` ms until it is live, null: it is. */
  light(prompt, waiting = null) {
    const wanted = prompt.trim().toLowerCase();
    this.chips.forEach((chip, index) => {
      const { name, prompt: own } = this.styles[index];
      const on = wanted === own.toLowerCase() || wanted === name;
      chip.setAttribute("aria-pressed", on);
      if (on && waiting) {
        chip.style.setProperty("--due", `${Math.round(waiting)}ms`);
        chip.dataset.state = "waiting";
      } else {
        delete chip.dataset.state;
      }
      if (on && this.lit !== chip) {
        this.lit = chip;
        chip.scrollIntoView({ block: "nearest", inline: "nearest" });
      }
    });
  }

  /** Press the chip number ``index``, from 0. */
  press(index) {
    this.chips[index]?.click();
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const now = this.chips.indexOf(document.activeElement);
    if (!step || now < 0) return;
    event.preventDefault();
    this.chips[(now + step + this.chips.length) % this.chips.length].focus();
  }
}
