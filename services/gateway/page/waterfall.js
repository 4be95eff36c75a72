// Where each millisecond of the last chunks went: one row a chunk, newest on top, waiting paler than working.

import { $, make } from "./dom.js";

const ROWS = 20;
const ROW = 13;
const LEFT = 64;
const NS = 1e6;
const COLOURS = ["#5b8fd6", "#3fa796", "#d6a23f", "#c9622f", "#d9825b", "#e6a487", "#8d6bc9", "#b05a95", "#7a8794"];
const ORDER = ["capture", "ingest", "encode", "motion", "scheduler", "step", "stage", "denoise", "decode", "egress"];

const rank = (hop) => {
  const found = ORDER.findIndex((name) => hop.startsWith(name));
  return found < 0 ? ORDER.length : found;
};

/** A chunk's way as [{name, from, wait, work}], in ms from its first frame's capture, and its whole length. */
export function wayOf(chunk) {
  let length = chunk.end_ns ? (chunk.end_ns - chunk.begin_ns) / NS : 0;
  const parts = chunk.hops.map((hop) => {
    const begin = (hop.begin_ns - chunk.begin_ns) / NS;
    length = Math.max(length, begin + hop.duration_ms);
    return { name: hop.hop, from: Math.max(0, begin - hop.wait_ms), wait: hop.wait_ms, work: hop.duration_ms };
  });
  return { parts, length };
}

/** A link to Jaeger; whoever gives its address does not see where it was followed from. */
const linked = (href) => ({ href, target: "_blank", rel: "noreferrer noopener" });

function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

const outcome = ({ verdict, reason }) => (reason ? `, ${verdict}: ${reason.replace(":", ", ")}` : verdict === "late" ? ", late" : "");

/** The fold ``#waterfall``. Asked for chunks only while it is open. */
export class Waterfall {
  constructor(now) {
    this.now = now;
    this.fold = $("waterfall-fold");
    this.box = $("waterfall");
    this.names = [];
    this.fold.ontoggle = () => this.settle();
  }

  /** The focused stream, or its chunks, changed. */
  settle() {
    const stream = this.now();
    if (stream) stream.wantsChunks = this.fold.open;
    if (!this.fold.open) return;
    const chunks = (stream?.trace.chunks ?? []).filter((chunk) => chunk.begin_ns).slice(-ROWS).reverse();
    if (!chunks.length) {
      this.box.replaceChildren(make("p", { class: "empty" }, stream ? "Waiting for the next chunks." : "Start a stream to see its chunks."));
      return;
    }
    this.draw(chunks.map((chunk) => ({ chunk, ...wayOf(chunk) })), stream.trace.jaeger_url);
  }

  colour(name) {
    if (!this.names.includes(name)) this.names = [...this.names, name].sort((a, b) => rank(a) - rank(b));
    return COLOURS[this.names.indexOf(name) % COLOURS.length];
  }

  draw(rows, jaeger) {
    const width = Math.max(320, this.box.clientWidth);
    const longest = Math.max(100, ...rows.map((row) => row.length));
    const scale = (width - LEFT - 56) / longest;
    const height = rows.length * ROW + 22;
    const drawing = svg("svg", { class: "falls", viewBox: `0 0 ${width} ${height}`, role: "img" });
    for (const row of rows) for (const part of row.parts) this.colour(part.name);
    rows.forEach(({ chunk, parts, length }, index) => {
      const y = index * ROW;
      const number = svg("text", { x: LEFT - 8, y: y + 10, "text-anchor": "end" }, `${chunk.chunk}`);
      const link = chunk.jaeger_url ? svg("a", linked(chunk.jaeger_url)) : null;
      link?.append(number);
      drawing.append(link ?? number);
      for (const { name, from, wait, work } of parts) {
        const hint = `${name}: ${wait.toFixed(1)} ms waiting, ${work.toFixed(1)} ms working`;
        const bar = (start, size, more) => {
          const rect = svg("rect", { x: LEFT + start * scale, y: y + 2, width: Math.max(0.5, size * scale), height: ROW - 3, rx: 1.5, ...more });
          rect.append(svg("title", {}, hint));
          drawing.append(rect);
        };
        if (wait > 0.05) bar(from, wait, { class: "queue" });
        if (work > 0.05) bar(from + wait, work, { fill: this.colour(name) });
      }
      drawing.append(svg("text", { x: LEFT + length * scale + 6, y: y + 10 }, `${Math.round(length)} ms${outcome(chunk)}`));
    });
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      drawing.append(svg("text", { x: LEFT + tick * longest * scale, y: height - 4, "text-anchor": "middle" }, `${Math.round(tick * longest)}`));
    }
    const typical = rows[Math.floor(rows.length / 2)];
    drawing.setAttribute("aria-label", `The last ${rows.length} chunks; one in the middle took ${Math.round(typical.length)} milliseconds`);
    const legend = make("div", { class: "legend" });
    for (const name of this.names) {
      const swatch = make("i", {});
      swatch.style.background = this.colour(name);
      legend.append(make("span", {}, swatch, name));
    }
    if (jaeger) legend.append(make("a", linked(jaeger), "Open in Jaeger"));
    this.box.replaceChildren(legend, drawing);
  }
}
