// Wires the page: streams on one side, the parts of the desk on the other. Decisions are in the parts.

import { api, viewOnly, watched } from "./api.js";
import { bind } from "./binding.js";
import { Chips } from "./chips.js";
import { Dials } from "./dials.js";
import { $, announce, toast } from "./dom.js";
import { explain } from "./explain.js";
import { fitting } from "./fitting.js";
import { Grid } from "./grid.js";
import { Picture } from "./picture.js";
import { Prompt } from "./prompt.js";
import { supported } from "./rtc.js";
import { Settings } from "./settings.js";
import { Cancelled, SourceTrouble, open } from "./source.js";
import { showVitals, troubleOf } from "./status.js";
import { Stream } from "./stream.js";
import { Timeline } from "./timeline.js";
import { Waterfall } from "./waterfall.js";

const NEWS_MS = 60_000;
const SIZES = [[256, 160], [320, 192], [384, 224], [480, 272]];

class Page {
  constructor() {
    this.streams = [];
    this.focused = null;
    const now = () => this.focused;
    const refused = (error) => this.refused(error);
    this.picture = new Picture({ refused });
    this.dials = new Dials({ now, refused, resize: () => this.resize() });
    this.dials.offer(SIZES);
    this.chips = new Chips((prompt) => this.prompt.use(prompt));
    this.prompt = new Prompt({
      now,
      blend: () => this.dials.blendChunks(),
      lit: (prompt, waiting) => this.chips.light(prompt, waiting),
      start: () => this.kind && this.begin(this.kind),
    });
    const blend = () => this.dials.blendChunks();
    this.timeline = new Timeline({ now, prompt: () => $("prompt").value, blend, refused });
    this.waterfall = new Waterfall(now);
    this.settings = new Settings({
      model: (name) => this.chips.load(name),
      fps: (fps) => this.focused && !this.focused.ended && this.focused.patch({ fps }).catch(refused),
    });
    this.grid = new Grid({
      streams: () => this.streams,
      focused: now,
      focus: (stream) => this.focus(stream),
      close: (stream) => this.close(stream),
    });
    bind(this);
    setInterval(() => this.settle(), 500);
  }

  mode(name) {
    document.documentElement.dataset.mode = name;
    $("welcome").hidden = name !== "welcome";
    $("new-stream").hidden = name !== "desk";
    for (const scene of document.querySelectorAll(".scene")) scene.hidden = name !== "welcome";
  }

  /** Open a source of this kind; it takes the focused stream's place unless ``fresh``. */
  async begin(kind, { fresh = false } = {}) {
    if (this.opening) return;
    this.opening = true;
    this.pressed = performance.now();
    const replaced = fresh ? null : this.focused;
    try {
      const { source, media, label } = await open(kind, (line) => this.say(line));
      this.kind = kind;
      this.say("Starting");
      const stream = await this.create(source, { media, label });
      if (replaced) await this.close(replaced, { keepFocus: true });
      this.focus(stream);
    } catch (error) {
      if (!(error instanceof Cancelled)) this.stuck(error, kind);
    } finally {
      this.opening = false;
      this.say("");
      this.marks();
    }
  }

  async create(source, { media = null, label = "" }) {
    const wanted = {
      source,
      prompt: $("prompt").value.trim() || "a pencil drawing",
      sinks: supported ? [{ kind: "whep" }] : [{ kind: "null" }],
      deadline_ms: 1000,
      min_fps: 4,
      ...this.settings.spec(),
      ...this.dials.spec(),
    };
    try {
      const spec = this.streams.some((each) => !each.ended) ? await fitting(wanted) : wanted;
      const view = await this.start(spec);
      const stream = new Stream(view, { media, label });
      stream.born = performance.now();
      stream.pressed = this.pressed;
      stream.kind = this.kind;
      stream.asked = wanted;
      this.adopt(stream);
      return stream;
    } catch (error) {
      for (const track of media?.getTracks() ?? []) track.stop();
      throw error;
    }
  }

  // A server without WebRTC has no sink for it: its pictures come as JPEGs.
  async start(spec) {
    try {
      return await api.create(spec);
    } catch (error) {
      if (!/whep|WebRTC/.test(error.message) || error.status !== 409) throw error;
      return api.create({ ...spec, sinks: [{ kind: "null" }] });
    }
  }

  adopt(stream) {
    this.streams.push(stream);
    stream.addEventListener("view", () => this.settle());
    stream.addEventListener("stats", () => stream === this.focused && this.waterfall.settle());
    stream.addEventListener("change", ({ detail }) => {
      if (detail.what === "prompt" && detail.state === "waiting") this.timeline.heard($("prompt").value.trim());
      if (stream === this.focused) this.prompt.follow(detail);
    });
    stream.addEventListener("told", ({ detail }) => this.told(stream, detail));
    stream.player.addEventListener("refused", ({ detail }) => stream === this.focused && this.refused(detail));
    stream.player.addEventListener("frame", () => this.first(stream), { once: true });
    stream.media?.getVideoTracks()[0]?.addEventListener("ended", () => (stream.mediaEnded = !stream.ended));
    const thumbnails = () => {
      const now = stream.source.picture;
      if (now && stream === this.focused) this.chips.from(now);
    };
    stream.source.addEventListener("frame", () => setTimeout(thumbnails, 400), { once: true });
    stream.open();
    this.grid.settle();
  }

  // How long it took from the press to the first restyled picture: on the element, for whoever measures.
  first(stream) {
    if (!stream.pressed) return;
    const took = performance.now() - stream.pressed;
    $("result").dataset.firstPicture = Math.round(took);
    announce(`The picture is there after ${(took / 1000).toFixed(1)} seconds`);
  }

  told(stream, event) {
    const reasons = { source_lost: event.reason || "It gives no pictures.", source_back: "", live: "" };
    if (event.event in reasons) stream.lost = reasons[event.event];
    if (event.event === "listening") stream.listening = event.reason;
    if (event.event === "source_back" || event.event === "live") stream.listening = "";
    const news = Date.now() - event.at_ns / 1e6 < NEWS_MS; // a page that comes later is told of old ones, too
    if (event.event === "warning" && stream === this.focused && event.reason && news) toast(event.reason);
    if (["tier_changed", "stopped", "failed", "recovering", "resumed"].includes(event.event)) stream.refresh().catch(() => {});
    this.settle();
  }

  focus(stream) {
    this.focused = stream;
    this.mode(viewOnly ? "watch" : "desk");
    this.picture.show(stream);
    $("source-frame").querySelector(".player")?.remove();
    $("source-frame").prepend(stream.source.element);
    for (const each of this.streams) if (each !== stream) each.attend(false);
    stream.attend(true);
    stream.source.placed();
    if (stream.view.prompt && document.activeElement !== $("prompt")) $("prompt").value = stream.view.prompt;
    this.chips.light(stream.view.prompt);
    if (!viewOnly) this.chips.load(stream.view.model);
    this.prompt.say("", "");
    if (stream.source.picture) this.chips.from(stream.source.picture);
    this.grid.settle();
    this.waterfall.settle();
    this.settle();
    this.marks();
  }

  async close(stream, { keepFocus = false } = {}) {
    stream.deleted = true;
    stream.close(false);
    this.streams = this.streams.filter((each) => each !== stream);
    if (!stream.ended) api.remove(stream.id).catch((error) => error.status !== 409 && error.status !== 404 && this.refused(error));
    if (keepFocus) return;
    if (stream === this.focused) {
      const next = this.streams.at(-1);
      if (next) this.focus(next);
      else this.home();
    }
    this.grid.settle();
  }

  home() {
    this.focused = null;
    this.picture.show(null);
    $("source-frame").querySelector(".player")?.remove();
    showVitals(null);
    this.mode("welcome");
  }

  /** No size in particular, or no stream to change: the same source begins anew. */
  resize() {
    if (this.focused && this.kind) this.begin(this.focused.kind ?? this.kind);
  }

  settle() {
    const stream = this.focused;
    if (!stream) return;
    showVitals(stream);
    this.dials.show(stream.view);
    this.follow(stream);
    this.picture.settle();
    const trouble = troubleOf(stream);
    this.picture.note(trouble && { ...trouble, acts: this.actsFor(trouble.act, stream) });
    this.marks();
  }

  // A prompt that came from elsewhere, e.g. a timeline or the API, stands in the field unless somebody types there.
  follow(stream) {
    const { prompt, prompt_version: version } = stream.view;
    if (version === stream.seenVersion) return;
    const first = stream.seenVersion === undefined;
    stream.seenVersion = version;
    const ours = [...stream.changes.values()].some((change) => change.receipt.version === version);
    if (first || ours || !prompt || document.activeElement === $("prompt")) return;
    $("prompt").value = prompt;
    this.chips.light(prompt);
  }

  actsFor(act, stream) {
    if (viewOnly) return [];
    const again = () => this.begin(stream.kind ?? "sample");
    if (act === "restart") return [["Start again", again], ["Close", () => this.close(stream)]];
    if (act === "other") return [["Try again", again], ["Try a sample", () => this.begin("sample")]];
    if (act === "copy") return [["Copy the address", () => navigator.clipboard?.writeText(stream.listening)]];
    return [];
  }

  marks() {
    for (const button of document.querySelectorAll(".kinds [data-kind]")) {
      button.setAttribute("aria-pressed", button.dataset.kind === (this.focused?.kind ?? ""));
    }
  }

  say(line) {
    $("use-camera").disabled = $("try-sample").disabled = Boolean(line);
    document.documentElement.toggleAttribute("data-busy", Boolean(line));
    if (line) announce(line);
    if (this.focused) this.prompt.say("", line);
    else $("welcome").querySelector(".sub").textContent = line ? `${line}…` : "Live, while you move.";
  }

  // What stood in the way of a start, with ways round it; beside a running picture a line is enough.
  stuck(error, kind) {
    if (this.focused && !(error instanceof SourceTrouble)) this.refused(error);
    else explain(error, { kind, begin: (other) => this.begin(other) });
  }

  refused(error) {
    toast(error.message, { stay: 9000 });
    announce(error.message);
  }

  /** Streams that run already, e.g. after a reload: they are there, and the newest is shown. */
  async resume() {
    if (watched) {
      const stream = new Stream(await api.get(watched), { label: "shared" });
      stream.born = performance.now();
      this.adopt(stream);
      this.focus(stream);
      return;
    }
    this.settings.load();
    const running = (await api.list()).filter((view) => !["stopped", "failed", "stopping"].includes(view.state));
    for (const view of running.slice(-9)) {
      const stream = new Stream(view);
      stream.born = performance.now();
      this.adopt(stream);
    }
    if (this.streams.length) this.focus(this.streams.at(-1));
  }
}

const page = new Page();
page.resume().catch((error) => {
  if (watched) explain(Object.assign(error, { title: "This link shows nothing", others: [] }), { kind: "", begin: () => {} });
  else page.refused(error);
});
