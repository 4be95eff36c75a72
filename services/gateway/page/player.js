// One moving picture: by WebRTC where that connects, else as a stream of JPEGs. Never black: the last frame is held.

import { api, pictures } from "./api.js";
import { supported, watch } from "./rtc.js";

const FIRST_FRAME_MS = 5000; // so long WebRTC may take until its first picture, then JPEGs come beside it
const STALL_MS = 1500;
const GLANCE_MS = 1000;
const GLANCE_WAIT_MS = 3000; // so long one glance may keep the others waiting

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let glances = Promise.resolve();

// One glance at a time, whichever stream's it is: a browser allows six connections to one server.
function inTurn(signal, look) {
  const mine = glances.then(async () => {
    if (signal.aborted) return null;
    const waiting = new AbortController();
    const enough = () => waiting.abort();
    const timer = setTimeout(enough, GLANCE_WAIT_MS);
    signal.addEventListener("abort", enough);
    try {
      return await look(waiting.signal);
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", enough);
    }
  });
  glances = mine.catch(() => {});
  return mine;
}

/**
 * Shows a stream's result (or its source) in ``element``. Events: "frame", "state" (detail: connecting, live, held),
 * "refused" (detail: an ApiError). ``still``: nothing new comes now, e.g. while the stream is paused.
 */
export class Player extends EventTarget {
  constructor(id, what = "result") {
    super();
    this.id = id;
    this.what = what;
    this.near = what === "source"; // it is started while it is looked at only
    this.still = false;
    this.state = "off";
    this.shown = 0; // when the newest frame came, in ms
    this.frames = 0;
    this.element = document.createElement("div");
    this.element.className = "player";
    this.canvas = document.createElement("canvas");
    this.canvas.width = 16;
    this.canvas.height = 9;
    this.canvas.setAttribute("aria-hidden", "true");
    this.video = document.createElement("video");
    Object.assign(this.video, { muted: true, autoplay: true, playsInline: true, disablePictureInPicture: true });
    this.video.setAttribute("aria-label", what === "result" ? "The restyled picture" : "The source");
    this.element.append(this.canvas, this.video);
    this.watchFrames();
  }

  /** Begin to receive. */
  start() {
    if (this.running) return;
    this.running = true;
    this.to("connecting");
    this.checking = setInterval(() => this.check(), 250);
    if (supported && this.what === "result") {
      this.link = watch(this.id, this.video, (state, error) => this.linked(state, error));
      this.fallback = setTimeout(() => this.receiveJpegs(), FIRST_FRAME_MS);
    } else {
      this.receiveJpegs();
    }
  }

  /** Stop receiving; the last frame stays. */
  stop(tell = true) {
    if (!this.running) return;
    this.hold();
    this.running = false;
    clearInterval(this.checking);
    clearTimeout(this.fallback);
    this.link?.stop(tell);
    this.link = null;
    this.jpegs?.abort();
    this.jpegs = null;
    this.to("off");
  }

  /** Whether it is the large picture: only then a connection is held for its JPEGs, else they come now and then. */
  attend(near) {
    if (near === this.near) return;
    this.near = near;
    if (!this.jpegs) return;
    if (near) this.shown = performance.now(); // glances are far apart: that is no trouble to speak of
    this.jpegs.abort();
    this.jpegs = null;
    this.receiveJpegs();
  }

  /** It stands in the document again: a browser pauses a video that is moved. */
  placed() {
    if (this.video.srcObject) this.video.play().catch(() => {});
  }

  /** The network is back, or the stream: do not wait for the back-off. */
  hurry() {
    this.link?.hurry();
  }

  linked(state, error) {
    if (state === "refused" || (state === "cut" && error)) {
      clearTimeout(this.fallback);
      this.receiveJpegs();
      if (state === "refused" && [401, 403].includes(error.status)) this.dispatchEvent(new CustomEvent("refused", { detail: error }));
    }
    if (state === "cut") this.hold();
  }

  async receiveJpegs() {
    if (this.jpegs || !this.running) return;
    const mine = (this.jpegs = new AbortController());
    const { near } = this;
    const path = api.path(this.id, this.what === "result" ? "/mjpeg" : "/source/mjpeg");
    for (let tries = 0; !mine.signal.aborted; tries++) {
      try {
        for await (const bitmap of near ? pictures(path, mine.signal) : this.glance(mine.signal)) {
          tries = 0;
          this.showJpeg(mine, bitmap);
        }
        if (!near) tries = 0;
      } catch (error) {
        if (mine.signal.aborted) return;
        if ([401, 403].includes(error.status)) this.dispatchEvent(new CustomEvent("refused", { detail: error }));
        if ([401, 403].includes(error.status)) return;
      }
      await pause(Math.min(5000, (near ? 300 : GLANCE_MS) * 2 ** tries));
    }
  }

  // One picture, or none where none is to be expected or seen.
  async *glance(signal) {
    if (this.still || document.hidden) return;
    const bitmap = await inTurn(signal, (waiting) => api.snapshot(this.id, waiting));
    if (bitmap) yield bitmap;
  }

  // Once WebRTC shows pictures, JPEGs are no longer needed.
  showJpeg(mine, bitmap) {
    if (this.byVideo) {
      mine.abort();
      if (this.jpegs === mine) this.jpegs = null;
    }
    if (!mine.signal.aborted) {
      this.draw(bitmap);
      this.came();
    }
    bitmap.close();
  }

  watchFrames() {
    const each = () => {
      this.video.requestVideoFrameCallback(each);
      if (!this.video.srcObject) return; // it was stopped meanwhile
      this.byVideo = true;
      this.video.hidden = false;
      this.came();
    };
    if ("requestVideoFrameCallback" in this.video) this.video.requestVideoFrameCallback(each);
    else this.video.addEventListener("timeupdate", () => this.video.readyState > 1 && ((this.byVideo = true), this.came()));
    this.video.hidden = true;
  }

  came() {
    this.shown = performance.now();
    this.frames += 1;
    if (this.running) this.to("live");
    this.dispatchEvent(new Event("frame"));
  }

  check() {
    if (this.state === "live" && performance.now() - this.shown > STALL_MS) this.hold();
  }

  // Keep what was seen last on the canvas, below everything that may come.
  hold() {
    if (this.byVideo && this.video.videoWidth) this.draw(this.video);
    this.byVideo = false;
    this.video.hidden = true;
    if (this.state === "live") this.to("held");
    if (this.running && this.what === "result" && this.link) {
      clearTimeout(this.fallback);
      this.fallback = setTimeout(() => !this.byVideo && this.receiveJpegs(), FIRST_FRAME_MS);
    }
  }

  draw(image) {
    const width = image.videoWidth || image.width;
    const height = image.videoHeight || image.height;
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    this.canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  }

  to(state) {
    if (state === this.state) return;
    this.state = state;
    this.element.dataset.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: state }));
  }

  /** The picture now: a <video> or <canvas> that can be drawn, and its size. Null before the first frame. */
  get picture() {
    if (!this.frames) return null;
    if (this.byVideo && this.video.videoWidth) {
      return { image: this.video, width: this.video.videoWidth, height: this.video.videoHeight };
    }
    return { image: this.canvas, width: this.canvas.width, height: this.canvas.height };
  }
}

/** Shows the user's own camera, screen or file at once: it needs no way over the network. */
export class LocalPicture extends Player {
  constructor(media) {
    super("", "source");
    this.media = media;
    this.video.srcObject = media;
    this.video.play().catch(() => {});
  }

  start() {
    this.running = true;
  }

  stop() {
    this.hold();
    this.running = false;
    this.video.srcObject = null;
    for (const track of this.media.getTracks()) track.stop();
    this.to("off");
  }

  check() {}
}
