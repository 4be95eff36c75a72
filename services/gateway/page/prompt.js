// The prompt: send, count down from the receipt to the chunk, say why a change was refused. Two prompts may be mixed.

import { api } from "./api.js";
import { $, announce } from "./dom.js";

const GOES_AFTER_MS = 4000;

/** The prompt's row. ``now()`` gives the focused Stream or null, ``blend()`` the chunks over which prompts fade. */
export class Prompt {
  constructor({ now, blend, lit, start }) {
    Object.assign(this, { now, blend, lit, start });
    this.field = $("prompt");
    this.second = $("prompt2");
    this.due = $("due");
    $("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    for (const field of [this.field, this.second]) {
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          this.send();
        }
      });
    }
    $("toggle-mix").onclick = () => this.mix($("mix").hidden);
    $("weight").oninput = () => this.weigh();
    $("weight").onchange = () => this.second.value.trim() && this.send();
    this.weigh();
  }

  get mixing() {
    return !$("mix").hidden && Boolean(this.second.value.trim());
  }

  mix(on) {
    $("mix").hidden = !on;
    $("toggle-mix").setAttribute("aria-pressed", on);
    if (on) this.second.focus();
    else if (this.second.value.trim()) this.send();
  }

  weigh() {
    const weight = Number($("weight").value);
    $("weight").style.setProperty("--part", `${weight}%`);
    $("w1").textContent = 100 - weight;
    $("w2").textContent = weight;
  }

  /** What would be sent: one prompt, or two with weights. */
  parts() {
    const first = this.field.value.trim();
    if (!this.mixing) return [{ text: first, weight: 1 }];
    const weight = Number($("weight").value) / 100;
    return [{ text: first, weight: 1 - weight }, { text: this.second.value.trim(), weight }].filter((part) => part.weight > 0);
  }

  /** Put ``text`` into the field and send it. */
  use(text) {
    this.field.value = text;
    return this.send();
  }

  async send() {
    const stream = this.now();
    const parts = this.parts();
    if (!parts[0].text) return this.say("refused", "Say what the picture should become, e.g. “a pencil drawing”.");
    if (!stream || stream.ended) {
      this.lit(parts[0].text);
      return this.start?.();
    }
    const blend = this.blend();
    try {
      const change = await stream.change("prompt", () =>
        parts.length === 1 && !this.weighted
          ? api.patch(stream.id, blend ? { prompt: parts[0].text, blend_chunks: blend } : { prompt: parts[0].text })
          : api.prompt(stream.id, { prompts: parts, blend_chunks: blend }),
      );
      this.weighted = parts.length > 1;
      change.prompt = parts.length === 1 ? parts[0].text : "";
    } catch (error) {
      this.say("refused", error.message);
      announce(`Refused: ${error.message}`);
    }
    return undefined;
  }

  /** A change of the focused stream moved: count down, or tell that it is live. */
  follow(change) {
    clearTimeout(this.going);
    if (change.state === "live") {
      this.change = null;
      const took = ((change.at - change.sent) / 1000).toFixed(1);
      this.say("live", `live after ${took} s`);
      if (change.what === "prompt") {
        this.lit(this.field.value);
        announce(`The prompt is live after ${took} seconds`);
      }
      this.going = setTimeout(() => this.say("", ""), GOES_AFTER_MS);
      return;
    }
    this.change = change;
    if (change.what === "prompt") this.lit(this.field.value, Math.max(200, change.expected - performance.now()));
    this.tick();
  }

  tick() {
    cancelAnimationFrame(this.ticking);
    const change = this.change;
    if (!change) return;
    const left = Math.max(0, (change.expected - performance.now()) / 1000);
    const late = performance.now() - change.expected > 4000;
    if (late) this.say("waiting", "waiting for the next chunk");
    else if (left < 0.05) this.say("waiting", "any moment now");
    else this.say("waiting", `live in ${left.toFixed(1)} s`);
    this.ticking = requestAnimationFrame(() => this.tick());
  }

  say(state, text) {
    if (state !== "waiting") this.change = null;
    this.due.dataset.state = state;
    if (this.due.textContent !== text) this.due.textContent = text;
  }
}
