// One stream as the page knows it: what it runs with, how it does, what happened, and when a change is live.

import { api, serverEvents } from "./api.js";
import { LocalPicture, Player } from "./player.js";
import { publish } from "./rtc.js";

const POLL_MS = 1000;
const ENDED = new Set(["stopped", "failed"]);

/**
 * Events: "view" (settings or state), "stats", "told" (detail: a StreamEvent), "change" (detail: a Change whose state moved),
 * "link" (detail: connecting, connected, cut, refused: how our own camera gets there), "ended".
 */
export class Stream extends EventTarget {
  constructor(view, { media = null, label = "" } = {}) {
    super();
    this.id = view.id;
    this.view = view;
    this.label = label;
    this.stats = null;
    this.trace = { chunks: [] };
    this.changes = new Map();
    this.applied = [];
    this.lastId = "0"; // before all: what was told while nobody listened is told first
    this.near = false;
    this.trouble = null;
    this.reachable = true;
    this.player = new Player(view.id);
    this.source = media ? new LocalPicture(media) : new Player(view.id, "source");
    this.media = media;
    this.closing = new AbortController();
  }

  get ended() {
    return ENDED.has(this.view.state);
  }

  /** Begin: our camera goes out, events and figures come in. */
  open() {
    if (this.media) {
      this.link = publish(this.id, this.media, (state, error) => {
        this.linkState = state;
        this.linkError = error ?? null;
        this.dispatchEvent(new CustomEvent("link", { detail: state }));
      });
    }
    if (!this.ended) this.player.start();
    this.poll();
  }

  /**
   * Whether it is the one in focus. Only then connections are held for it, for its events, its source and its JPEGs: a
   * browser allows six to one server, and what goes beyond waits without a word. The others are polled.
   */
  attend(near) {
    if (near === this.near) return;
    this.near = near;
    this.player.attend(near);
    if (near && !this.ended) this.source.start();
    else if (!this.media) this.source.stop();
    if (near) this.hear();
    else this.hearing.abort();
  }

  /** Let go of everything of it in this page; the stream itself goes on unless it was deleted. */
  close(tell = true) {
    this.closing.abort();
    this.hearing?.abort();
    clearTimeout(this.polling);
    this.link?.stop(tell);
    this.player.stop(tell);
    this.source.stop();
  }

  async hear() {
    const { signal } = (this.hearing = new AbortController());
    for (let tries = 0; !signal.aborted; tries++) {
      try {
        for await (const message of serverEvents(api.path(this.id, "/events"), signal, this.lastId)) {
          tries = 0;
          if (message.id) this.lastId = message.id;
          this.reached(true);
          this.take(message);
        }
      } catch (error) {
        if (signal.aborted || error.status === 404) return;
        if (!error.status) this.reached(false);
      }
      if (this.ended) return;
      await new Promise((resolve) => setTimeout(resolve, Math.min(4000, 250 * 2 ** tries)));
    }
  }

  take(message) {
    let told;
    try {
      told = JSON.parse(message.data);
    } catch {
      return;
    }
    if (message.event === "stats") {
      this.stats = told;
      this.dispatchEvent(new Event("stats"));
      return;
    }
    if (!told.event) return;
    if (told.event === "applied") this.apply(told);
    this.dispatchEvent(new CustomEvent("told", { detail: told }));
  }

  async poll() {
    try {
      await this.refresh();
      if (this.wantsChunks) this.trace = await api.trace(this.id);
      this.dispatchEvent(new Event("stats"));
    } catch (error) {
      if (error.status === 404) return this.end("the stream is gone: its time has passed, or it was closed elsewhere");
      if (!error.status) this.reached(false);
    }
    if (!this.closing.signal.aborted) this.polling = setTimeout(() => this.poll(), this.ended ? 10_000 : POLL_MS);
  }

  /** Ask for its state and figures; who asks meanwhile waits for the same answer. */
  refresh() {
    this.refreshing ??= this.askState().finally(() => (this.refreshing = null));
    return this.refreshing;
  }

  async askState() {
    const [view, stats] = await Promise.all([api.get(this.id), api.stats(this.id).catch(() => null)]);
    this.reached(true);
    const was = this.view.state;
    this.view = view;
    this.player.still = view.paused;
    if (stats) this.stats = stats.live;
    this.dispatchEvent(new Event("view"));
    if (was !== view.state && this.ended) this.end(view.reason);
  }

  end(reason) {
    this.view = { ...this.view, state: ENDED.has(this.view.state) ? this.view.state : "stopped", reason };
    this.link?.stop(false);
    this.player.stop(false);
    this.source.stop();
    this.dispatchEvent(new Event("ended"));
    this.dispatchEvent(new Event("view"));
  }

  reached(now) {
    if (now === this.reachable) return;
    this.reachable = now;
    if (now) {
      this.player.hurry();
      this.link?.hurry();
    }
    this.dispatchEvent(new Event("view"));
  }

  /** Milliseconds from a frame's capture to the screen, as far as known. */
  get latency() {
    const stats = this.stats ?? {};
    return stats.latency_ms || stats.latency_p50_ms || this.view.promise?.latency_ms || 600;
  }

  /** Ask for a change. ``ask`` sends it and gives the receipt. Returns a Change; raises what ``ask`` raises. */
  async change(what, ask) {
    const sent = performance.now();
    const receipt = await ask();
    const known = this.applied.find((told) => told.command === receipt.command);
    const change = { what, receipt, sent, expected: sent + this.expectedMs(), state: "waiting", chunk: -1, at: 0 };
    this.changes.set(receipt.command, change);
    if (known) this.apply(known);
    else this.dispatchEvent(new CustomEvent("change", { detail: change }));
    this.ensure(change);
    return change;
  }

  // Events may be late or lost with their connection: ask for the receipt as well.
  async ensure(change) {
    for (let tries = 0; tries < 10 && change.state === "waiting" && !this.closing.signal.aborted; tries++) {
      await new Promise((resolve) => setTimeout(resolve, 1000 + 500 * tries));
      const receipt = await api.receipt(this.id, change.receipt.command).catch(() => null);
      if (receipt?.state === "applied") this.apply(receipt);
    }
  }

  // What changes took lately, else the latency: a change travels with the next chunk.
  expectedMs() {
    const took = [...this.changes.values()].filter((c) => c.at).slice(-4).map((c) => c.at - c.sent);
    return took.length ? took.reduce((a, b) => a + b) / took.length : this.latency + 150;
  }

  apply(told) {
    this.applied = [...this.applied.slice(-30), told];
    const change = this.changes.get(told.command);
    if (!change || change.state !== "waiting") return;
    change.state = "bound";
    change.chunk = told.chunk;
    change.until = told.until_chunk;
    // The chunk is bound when it enters the model; it is seen once it has gone the rest of the way.
    const rest = Math.max(0, Math.min(2000, this.latency * 0.8));
    change.expected = performance.now() + rest;
    this.dispatchEvent(new CustomEvent("change", { detail: change }));
    setTimeout(() => {
      change.state = "live";
      change.at = performance.now();
      this.dispatchEvent(new CustomEvent("change", { detail: change }));
    }, rest);
  }

  patch(changes) {
    this.asked = { ...this.asked, ...changes };
    return this.change(Object.keys(changes).join(", "), () => api.patch(this.id, changes));
  }
}
