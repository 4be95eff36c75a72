// The large picture: what it shows, the line between before and after, the notes over it, and its tools.

import { api } from "./api.js";
import { $, announce, ask, icon, make, save, stamp, toast } from "./dom.js";

const DELAY_CAP = 90; // frames of the source that are kept, so that "before" is the moment that "after" shows

/** The result's panel. ``pauseOrGo`` and ``refused`` belong to the page. */
export class Picture {
  constructor({ refused }) {
    this.refused = refused;
    this.stream = null;
    this.kept = [];
    $("t-pause").onclick = () => this.pause();
    $("t-record").onclick = () => this.record();
    $("t-photo").onclick = () => this.snapshot();
    $("t-full").onclick = () => this.fullScreen();
    $("t-compare").onclick = () => this.compare();
    $("t-share").onclick = () => this.share();
    $("t-sound").onclick = () => this.sound();
    $("cut").oninput = () => this.place();
    $("share-copy").onclick = () => this.copy();
    this.place();
    setInterval(() => this.tickRecording(), 500);
  }

  /** Show this stream, or nothing. */
  show(stream) {
    if (this.stream === stream) return;
    this.stream?.player.element.remove();
    this.stream = stream;
    this.kept = [];
    this.note(null);
    $("tools").hidden = !stream;
    if (!stream) return this.compare(false);
    $("picture").prepend(stream.player.element);
    stream.player.placed();
    stream.player.video.onvolumechange = () => $("t-sound").setAttribute("aria-pressed", !stream.player.video.muted);
    this.settle();
    if (this.comparing) this.beginCompare();
    return undefined;
  }

  /** Tools and the note say what the stream does now. */
  settle() {
    const stream = this.stream;
    if (!stream) return;
    const paused = stream.view.paused;
    const label = paused ? "Go on" : "Pause";
    if ($("t-pause").getAttribute("aria-label") !== label) {
      $("t-pause").replaceChildren(icon(paused ? "play" : "pause"));
      $("t-pause").setAttribute("aria-label", label);
      $("t-pause").title = `${label} (space)`;
    }
    for (const id of ["t-pause", "t-record", "t-share"]) $(id).disabled = stream.ended;
    const on = Boolean(stream.recording);
    $("t-record").setAttribute("aria-pressed", on);
    if (!on) $("t-record-text").textContent = "record";
    const media = stream.player.video.srcObject;
    $("t-sound").hidden = !media?.getAudioTracks().some((track) => !track.muted);
  }

  /** Words over the picture: {title, text, acts: [[label, function], …]}, or null. The picture is held and dimmed. */
  note(said, { dim = true } = {}) {
    const key = said ? said.title + said.text : "";
    $("picture").dataset.held = Boolean(said) && dim && !said.quiet;
    $("note").classList.toggle("quiet-note", Boolean(said?.quiet));
    if (key === this.said) return;
    this.said = key;
    $("note").hidden = !said;
    if (!said) return;
    $("note-title").textContent = said.title;
    $("note-text").textContent = said.text;
    $("note-acts").replaceChildren(
      ...(said.acts ?? []).map(([label, act], index) => {
        const button = make("button", { type: "button", class: index ? "quiet" : "primary" }, label);
        button.onclick = act;
        return button;
      }),
    );
    announce(`${said.title}. ${said.text}`);
  }

  async pause() {
    const { stream } = this;
    if (!stream || stream.ended) return;
    try {
      const paused = stream.view.paused;
      await (paused ? api.resume(stream.id) : api.pause(stream.id));
      stream.view = { ...stream.view, paused: !paused };
      stream.dispatchEvent(new Event("view"));
      announce(paused ? "Going on" : "Paused");
    } catch (error) {
      this.refused(error);
    }
  }

  async record() {
    const { stream } = this;
    if (!stream || stream.ended || this.busy) return;
    this.busy = true;
    try {
      if (stream.recording) {
        const done = await api.stopRecording(stream.id);
        stream.recording = null;
        announce("The recording ends");
        this.offer(stream, done);
      } else {
        const begun = await api.record(stream.id);
        stream.recording = { ...begun, since: Date.now() };
        announce("Recording");
      }
    } catch (error) {
      this.refused(error);
    } finally {
      this.busy = false;
    }
    this.settle();
  }

  // The file is whole once egress has closed it, which the receipt tells: then it is offered.
  async offer(stream, { name, command }) {
    for (let tries = 0; tries < 40; tries++) {
      const receipt = await api.receipt(stream.id, command).catch(() => null);
      if (receipt?.state === "applied" || receipt?.state === "warning") break;
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
    const get = make("button", { class: "primary", type: "button" }, "download");
    get.onclick = async () => {
      try {
        save(await api.recording(name), name);
      } catch (error) {
        this.refused(error);
      }
    };
    toast(`Recorded: ${name}`, { action: get, stay: 60_000 });
  }

  tickRecording() {
    const since = this.stream?.recording?.since;
    if (!since) return;
    const seconds = Math.floor((Date.now() - since) / 1000);
    $("t-record-text").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }

  async snapshot() {
    const now = this.stream?.player.picture;
    if (!now) return;
    const canvas = make("canvas", { width: now.width, height: now.height });
    canvas.getContext("2d").drawImage(now.image, 0, 0);
    canvas.toBlob((blob) => {
      save(blob, `rheocast-${stamp()}.png`);
      announce("The picture is saved");
    }, "image/png");
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if ($("result").requestFullscreen) $("result").requestFullscreen().catch(() => {});
    else this.stream?.player.video.webkitEnterFullscreen?.(); // phones give it to videos only
  }

  sound() {
    const { video } = this.stream.player;
    video.muted = !video.muted;
    $("t-sound").setAttribute("aria-pressed", !video.muted);
  }

  async share() {
    try {
      const made = await api.share(this.stream.id);
      $("share-link").value = new URL(made.path, location.href).href;
      $("share-hint").textContent = `It ends ${new Date(made.until * 1000).toLocaleString()}.`;
      $("share-copy").textContent = "copy";
      ask("share-dialog");
      $("share-link").select();
    } catch (error) {
      this.refused(error);
    }
  }

  async copy() {
    $("share-link").select();
    try {
      await navigator.clipboard.writeText($("share-link").value);
      $("share-copy").textContent = "copied";
    } catch {
      $("share-copy").textContent = "press Ctrl-C";
    }
  }

  // --- before and after

  compare(on = !this.comparing) {
    this.comparing = on;
    $("picture").dataset.compare = on;
    $("t-compare").setAttribute("aria-pressed", on);
    $("cut").hidden = !on;
    cancelAnimationFrame(this.drawing);
    if (on) this.beginCompare();
    else this.kept = [];
  }

  place() {
    $("picture").style.setProperty("--cut", `${$("cut").value}%`);
    $("cut").setAttribute("aria-valuetext", `${Math.round($("cut").value)} % before`);
  }

  beginCompare() {
    const { stream } = this;
    if (!stream) return;
    const shown = make("canvas");
    $("before").replaceChildren(shown);
    let newest = -1;
    const draw = () => {
      if (stream !== this.stream || !this.comparing) return;
      this.drawing = requestAnimationFrame(draw);
      const source = stream.source.picture;
      const result = stream.player.picture;
      if (!source || !result) return;
      const now = performance.now();
      if (newest !== stream.source.frames) {
        newest = stream.source.frames;
        this.keep(source, result, now);
      }
      const due = stream.media ? now - stream.latency : now;
      const frame = this.kept.findLast((each) => each.at <= due) ?? this.kept[0];
      if (!frame || frame.shown) return;
      frame.shown = true;
      if (shown.width !== result.width) shown.width = result.width;
      if (shown.height !== result.height) shown.height = result.height;
      shown.getContext("2d").drawImage(frame.canvas, 0, 0);
    };
    draw();
  }

  // The source, cut to the result's shape as the server cuts it.
  keep(source, result, at) {
    const old = this.kept.length >= DELAY_CAP ? this.kept.shift() : null;
    const canvas = old?.canvas ?? make("canvas");
    canvas.width = result.width;
    canvas.height = result.height;
    const scale = Math.max(result.width / source.width, result.height / source.height);
    const [width, height] = [source.width * scale, source.height * scale];
    canvas.getContext("2d").drawImage(source.image, (result.width - width) / 2, (result.height - height) / 2, width, height);
    this.kept.push({ at, canvas, shown: false });
  }
}
