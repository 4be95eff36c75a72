// Choices for new streams, the theme, the token: what is asked rarely.

import { api, onTokenNeeded } from "./api.js";
import { $, ask, choices, make } from "./dom.js";

const SIZES = ["", "160×96", "256×160", "320×192", "384×224", "480×272", "512×512", "832×480"];

/** The dialogs that stand behind the bar's buttons. ``model(name)`` and ``fps(number)`` are told what is chosen. */
export class Settings {
  constructor({ model, fps }) {
    this.onModel = model;
    this.onFps = fps;
    $("open-settings").onclick = () => this.open();
    $("open-help").onclick = () => ask("help-dialog");
    $("toggle-theme").onclick = () => this.flip();
    for (const name of ["model", "size", "fps", "quality"]) {
      $(`s-${name}`).onchange = () => this.keep(name, $(`s-${name}`).value);
    }
    $("s-audio").onchange = () => choices.set("audio", $("s-audio").checked ? "1" : "");
    $("s-audio").checked = choices.get("audio") === "1";
    $("s-size").replaceChildren(...SIZES.map((size) => make("option", { value: size }, size || "the model’s own")));
    for (const name of ["size", "fps", "quality"]) $(`s-${name}`).value = choices.get(name) || $(`s-${name}`).value;
    onTokenNeeded(() => this.token());
  }

  keep(name, value) {
    choices.set(name, value);
    if (name === "model") this.onModel(value);
    if (name === "fps" && value) this.onFps(Number(value));
  }

  /** The parts of a new stream's spec that are chosen here. */
  spec() {
    const [width, height] = $("s-size").value.split("×").map(Number);
    const fps = Number($("s-fps").value);
    return {
      quality: $("s-quality").value,
      audio: $("s-audio").checked,
      ...($("s-model").value ? { model: $("s-model").value } : {}),
      ...(height ? { width, height } : {}),
      ...(fps ? { fps } : {}),
    };
  }

  /** Which models there are: those that are served first. */
  async load() {
    let models = [];
    try {
      const told = await api.models();
      models = told.models;
    } catch {
      // The server's default holds.
    }
    const served = models.filter((model) => model.served ?? true);
    $("s-model").replaceChildren(...(served.length ? served.map((model) => new Option(model.name)) : [new Option("rheo-tiny")]));
    const wanted = choices.get("model");
    if ([...$("s-model").options].some((option) => option.value === wanted)) $("s-model").value = wanted;
    this.onModel($("s-model").value);
  }

  async open() {
    $("s-capacity").textContent = "";
    api.capacity().then(
      (told) => {
        const [first] = told.tiers ?? [];
        if (first) $("s-capacity").textContent = `${first.more} more fit now.`;
      },
      () => {},
    );
    await ask("settings-dialog");
  }

  flip() {
    const root = document.documentElement;
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    choices.set("theme", root.dataset.theme);
  }

  async token() {
    $("token").value = "";
    return (await ask("token-dialog")) ? $("token").value.trim() : null;
  }
}
