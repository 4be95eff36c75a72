// Several streams: a short list beside the picture, and a wall of all of them. A click focuses one.

import { $, icon, make } from "./dom.js";
import { lineOf } from "./status.js";

const DRAW_MS = 250;

/** Tiles of ``streams()`` in the list and on the wall. ``focus(stream)`` and ``close(stream)`` belong to the page. */
export class Grid {
  constructor({ streams, focused, focus, close }) {
    Object.assign(this, { streams, focused, focus, close });
    this.tiles = new Map();
    this.open = false;
    $("open-grid").onclick = () => this.toggle();
    setInterval(() => this.draw(), DRAW_MS);
  }

  toggle(on = !this.open) {
    this.open = on && this.streams().length > 1;
    $("wall").hidden = !this.open;
    $("open-grid").setAttribute("aria-pressed", this.open);
    this.settle();
    if (this.open) $("wall").querySelector(".go")?.focus();
  }

  /** Streams came, went, or the focus moved. */
  settle() {
    const streams = this.streams();
    const many = streams.length > 1;
    $("open-grid").hidden = !many;
    if (!many && this.open) this.toggle(false);
    for (const [stream, tile] of this.tiles) {
      if (streams.includes(stream)) continue;
      tile.element.remove();
      this.tiles.delete(stream);
    }
    const place = this.open ? $("wall") : $("tiles");
    $("tiles").hidden = !many;
    for (const stream of streams) {
      let tile = this.tiles.get(stream);
      if (!tile) this.tiles.set(stream, (tile = this.tile(stream)));
      if (tile.element.parentNode !== place) place.append(tile.element);
      tile.element.setAttribute("aria-current", stream === this.focused());
    }
    this.draw();
  }

  tile(stream) {
    const canvas = make("canvas", { width: 152, height: 96, "aria-hidden": "true" });
    const name = make("span", {});
    const how = make("span", { class: "how" });
    const go = make("button", { class: "go", type: "button" }, name, how);
    go.onclick = () => {
      this.focus(stream);
      this.toggle(false);
    };
    const close = make("button", { class: "icon", type: "button", "aria-label": "Close this stream", title: "Close this stream" }, icon("close"));
    close.onclick = () => this.close(stream);
    return { element: make("li", { class: "tile" }, canvas, go, close), canvas, name, how };
  }

  draw() {
    if (document.hidden) return;
    for (const [stream, { canvas, name, how }] of this.tiles) {
      name.textContent = stream.view.prompt || stream.id;
      how.textContent = this.open && stream.label ? `${stream.label} · ${lineOf(stream)}` : lineOf(stream);
      const now = stream.player.picture;
      if (!now || !canvas.isConnected) continue;
      const [width, height] = this.open ? [now.width, now.height] : [152, 96];
      if (canvas.width !== width) canvas.width = width;
      if (canvas.height !== height) canvas.height = height;
      const scale = Math.max(width / now.width, height / now.height);
      const [w, h] = [now.width * scale, now.height * scale];
      canvas.getContext("2d").drawImage(now.image, (width - w) / 2, (height - h) / 2, w, h);
    }
  }
}
