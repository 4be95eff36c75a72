// The timeline: prompts one after the other, each for some seconds. Played, recorded while performing ("arm"), kept as a file.

import { api } from "./api.js";
import { $, icon, make, save, stamp } from "./dom.js";

const MAX_CUES = 64;

// A cue as we write it, or as Scope exports it: {startTime, endTime, prompts: [{text, weight}]}.
function cueOf(raw) {
  const parts = (raw.prompts ?? []).filter((part) => part.text?.trim());
  const heaviest = parts.sort((a, b) => (b.weight ?? 0) - (a.weight ?? 0))[0];
  const prompt = raw.prompt ?? raw.text ?? heaviest?.text ?? "";
  const seconds = Number(raw.seconds ?? (raw.endTime ?? raw.end_time) - (raw.startTime ?? raw.start_time));
  return { prompt: String(prompt).trim().slice(0, 8000), seconds: Math.min(3600, Math.round(seconds * 10) / 10) };
}

/** [{prompt, seconds}] from a file's text. Raises Error with what would be accepted. */
export function cuesOf(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Error("This is no timeline: a JSON file with “cues” is needed.");
  }
  const timeline = read?.timeline?.entries ?? read?.timeline;
  const found = [read, read?.cues, timeline, read?.prompts].find(Array.isArray) ?? [];
  const good = found.map(cueOf).filter((cue) => cue.prompt && cue.seconds > 0);
  if (!good.length) throw new Error("The file has no cues: each needs a “prompt” and “seconds” above 0.");
  return good.slice(0, MAX_CUES);
}

const LOOK_MS = 700;

/** The fold ``#timeline``. The gateway plays it, so that it goes on without the page; ``now()`` gives the stream or null. */
export class Timeline {
  constructor({ now, prompt, blend, refused }) {
    Object.assign(this, { now, prompt, blend, refused });
    this.cues = [];
    this.playing = -1;
    this.armed = false;
    this.track = make("div", { class: "track", role: "list", "aria-label": "Cues" });
    this.seconds = make("input", { class: "num", type: "number", min: 1, max: 3600, step: 1, value: 6, "aria-label": "Seconds of a new cue" });
    const button = (name, text, act) => {
      const made = make("button", { class: "quiet", type: "button" }, ...(name ? [icon(name)] : []), make("span", {}, text));
      made.onclick = act;
      return made;
    };
    this.play = button("play", "play", () => (this.playing < 0 ? this.begin(0) : this.stop()));
    this.arm = button("record", "arm", () => this.setArmed(!this.armed));
    this.arm.title = "Record what you send, with its timing";
    this.loop = make("input", { type: "checkbox", checked: true });
    this.loop.onchange = () => this.playing >= 0 && this.begin(this.playing);
    this.file = make("input", { type: "file", accept: "application/json,.json", class: "unseen", tabIndex: -1, "aria-label": "Timeline file" });
    this.file.onchange = () => this.read();
    const add = button("plus", "add this prompt", () => this.add(this.prompt(), Number(this.seconds.value) || 6));
    const clear = button("", "clear", () => this.set([]));
    const load = button("", "import", () => this.file.click());
    const keep = button("", "export", () => this.write());
    const length = make("label", {}, "for", this.seconds, "s");
    const around = make("label", { class: "check" }, this.loop, "loop");
    $("timeline").append(make("div", { class: "strip" }, this.play, around, this.arm, add, length, clear, load, keep, this.file), this.track);
    this.draw();
  }

  set(cues) {
    this.stop();
    this.cues = cues;
    this.draw();
  }

  add(prompt, seconds) {
    if (!prompt.trim() || this.cues.length >= MAX_CUES) return;
    this.cues.push({ prompt: prompt.trim(), seconds });
    this.draw();
  }

  setArmed(on) {
    this.armed = on;
    if (on) {
      this.set([]);
      this.last = null;
      this.heard(this.prompt());
    } else {
      this.endLast();
    }
    this.arm.setAttribute("aria-pressed", on);
    this.arm.lastChild.textContent = on ? "stop arming" : "arm";
    this.draw();
  }

  /** A prompt was sent: an armed timeline takes it, with how long the one before it lasted. */
  heard(prompt) {
    if (!this.armed || this.playing >= 0 || !prompt) return;
    this.endLast();
    this.last = { prompt, at: performance.now() };
  }

  endLast() {
    if (this.last) this.add(this.last.prompt, Math.max(0.5, Math.round((performance.now() - this.last.at) / 100) / 10));
    this.last = null;
  }

  async begin(index) {
    const stream = this.now();
    try {
      if (!this.cues.length) throw new Error("The timeline is empty: add the prompt, or arm it and perform.");
      if (!stream || stream.ended) throw new Error("Start a stream first: the timeline plays on it.");
      let at = 0;
      const entries = this.cues.map((cue) => {
        const entry = { at_s: at, prompt: cue.prompt, blend_chunks: this.blend() };
        at = Math.round((at + cue.seconds) * 1000) / 1000;
        return entry;
      });
      await api.putTimeline(stream.id, this.loop.checked ? { entries, loop_s: at } : { entries });
      await api.playTimeline(stream.id, index);
      this.playing = index;
      this.on = stream;
      this.draw();
      this.follow();
    } catch (error) {
      this.refused(error);
    }
  }

  // Which cue it is at is the gateway's to say.
  follow() {
    clearTimeout(this.next);
    this.next = setTimeout(async () => {
      const told = await api.timeline(this.on.id).catch(() => null);
      if (this.playing < 0) return;
      if (told && !told.playing) {
        this.playing = -1;
        if (told.error) this.refused(new Error(told.error));
      } else if (told) {
        this.playing = (told.next - 1 + this.cues.length) % this.cues.length;
      }
      this.draw();
      if (this.playing >= 0 && !this.on.ended) this.follow();
    }, LOOK_MS);
  }

  stop() {
    clearTimeout(this.next);
    if (this.playing >= 0 && !this.on.ended) api.stopTimeline(this.on.id).catch(this.refused);
    this.playing = -1;
    this.draw();
  }

  async read() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    try {
      this.set(cuesOf(await file.text()));
    } catch (error) {
      this.refused(error);
    }
  }

  write() {
    save(new Blob([JSON.stringify({ cues: this.cues }, null, 1)], { type: "application/json" }), `timeline-${stamp()}.json`);
  }

  draw() {
    const key = JSON.stringify([this.cues, this.playing]);
    if (key === this.drawn) return;
    this.drawn = key;
    const total = this.cues.reduce((sum, cue) => sum + cue.seconds, 0);
    this.track.replaceChildren(
      ...this.cues.map((cue, index) => {
        const element = make("button", { class: "cue", type: "button", "aria-current": index === this.playing }, make("span", {}, cue.prompt), make("small", {}, `${cue.seconds} s`));
        element.style.flexGrow = cue.seconds / (total || 1);
        element.title = "Play from here; delete removes it";
        element.onclick = () => this.begin(index);
        element.onkeydown = (event) => {
          if (event.key !== "Delete" && event.key !== "Backspace") return;
          this.cues.splice(index, 1);
          this.stop();
        };
        return make("div", { role: "listitem", class: "cue-place" }, element);
      }),
    );
    [...this.track.children].forEach((place, index) => (place.style.flexGrow = this.cues[index].seconds / (total || 1)));
    const playing = this.playing >= 0;
    this.play.replaceChildren(icon(playing ? "pause" : "play"), make("span", {}, playing ? "stop" : "play"));
    $("timeline-note").textContent = this.cues.length
      ? `${this.cues.length} cue${this.cues.length > 1 ? "s" : ""}, ${Math.round(total)} s${playing ? ", playing" : ""}`
      : "";
  }
}
