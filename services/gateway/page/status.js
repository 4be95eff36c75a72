// The bar's figures, and trouble in words: what is wrong, and the next step.

import { $, announce } from "./dom.js";

const REASONS = {
  stale: "came too late to be worth computing",
  late: "came too late",
  rate: "left out to hold the rate",
  recovering: "while the stream recovered",
  paused: "around a pause",
  lost: "lost on the way",
  overwritten: "the machine was busy",
};

/** One state a person understands: live, paused, starting, … */
export function stateOf(stream) {
  if (!stream.reachable) return "no connection";
  const { state, paused } = stream.view;
  if (paused && !stream.ended) return "paused";
  return { degraded: "live", stopping: "ending", stopped: "ended" }[state] ?? state;
}

/** Frames that were dropped, in words: "12 dropped: 10 came too late, 2 around a pause". */
export function dropsOf(ledger) {
  const dropped = Object.entries(ledger?.dropped ?? {});
  const total = dropped.reduce((sum, [, frames]) => sum + frames, 0);
  if (!total) return "";
  const words = dropped
    .sort((a, b) => b[1] - a[1])
    .slice(0, 3)
    .map(([name, frames]) => `${frames} ${REASONS[name.split(":")[1]] ?? name.replace(":", ": ").replaceAll("_", " ")}`);
  return `${total} frames dropped: ${words.join(", ")}`;
}

/** What the ladder took of what was ``asked`` for (or promised), or "". */
export function easedTo(view, asked = null) {
  const { tier, promise } = view;
  const was = promise?.tier;
  if (!tier || !was || view.state !== "degraded") return "";
  const given = [];
  if (tier.steps < Math.max(was.steps, view.steps, asked?.steps ?? 1)) given.push(`${tier.steps} step${tier.steps > 1 ? "s" : ""}`);
  const fps = Math.max(was.fps, asked?.fps ?? 0);
  if (fps && tier.fps && tier.fps < fps - 0.01) given.push(`${+tier.fps.toFixed(1)} fps`);
  if (tier.frames_per_block > was.frames_per_block) given.push(`blocks of ${tier.frames_per_block}`);
  return given.length ? `eased to ${given.join(", ")}` : "";
}

/** A stream's one line: "live · 15.9 fps · 312 ms". */
export function lineOf(stream) {
  const live = stream.stats ?? {};
  const words = [stateOf(stream)];
  if (!stream.ended && live.fps) words.push(`${live.fps.toFixed(1)} fps`, `${Math.round(live.latency_ms)} ms`);
  return words.join(" · ");
}

/** Fill the bar for the focused stream. */
export function showVitals(stream) {
  $("vitals").hidden = !stream;
  if (!stream) return;
  const live = stream.stats ?? {};
  const state = stateOf(stream);
  if ($("v-state").textContent !== state) $("v-state").textContent = state;
  $("v-lamp").dataset.on = state === "live" && stream.player.state === "live" ? "live" : "";
  $("v-fps").textContent = live.fps ? live.fps.toFixed(1) : "–";
  $("v-latency").textContent = live.latency_ms ? Math.round(live.latency_ms) : "–";
  $("v-ontime").textContent = live.fps ? (100 * live.on_time).toFixed(live.on_time === 1 ? 0 : 1) : "–";
  const eased = easedTo(stream.view, stream.asked);
  const drops = dropsOf(live.ledger ?? stream.view.ledger);
  const recent = recentDrops(stream, live.ledger ?? stream.view.ledger);
  const why = stream.view.tier_reason || "the machine is full";
  const badge = eased ? `${eased}: the machine is full` : recent ? "dropping frames" : "";
  $("v-tier").hidden = !badge;
  if (badge && $("v-tier").textContent !== badge) {
    $("v-tier").textContent = badge;
    announce(badge);
  }
  $("v-tier").title = [eased && why, drops].filter(Boolean).join(". ");
}

/** Whether more than a tenth of the last seconds' frames were dropped, beyond those a pause or the rate costs. */
function recentDrops(stream, ledger) {
  const now = performance.now();
  const lost = Object.entries(ledger?.dropped ?? {}).reduce((sum, [name, n]) => (/paused|rate/.test(name) ? sum : sum + n), 0);
  stream.drops = [...(stream.drops ?? []).filter((each) => now - each.at < 5000), { at: now, lost, all: ledger?.frames_in ?? 0 }];
  const [first] = stream.drops;
  const all = (ledger?.frames_in ?? 0) - first.all;
  return all > 20 && (lost - first.lost) / all > 0.1;
}

/** What to say over the picture: {title, text, act} or null. ``act`` names what the page offers beside. */
export function troubleOf(stream) {
  const { view, player } = stream;
  if (!stream.reachable || navigator.onLine === false) {
    return { title: "The connection is gone", text: "The last picture stands. It goes on by itself as soon as Rheocast answers again." };
  }
  if (view.state === "failed") {
    return { title: "The stream failed", text: view.reason || "No reason was given.", act: "restart" };
  }
  if (view.state === "stopped") {
    return { title: "The stream has ended", text: stream.deleted ? "It was closed." : view.reason || "Its source is at its end.", act: "restart" };
  }
  if (stream.linkState === "refused") {
    return { title: "The camera cannot be sent", text: stream.linkError?.message ?? "", act: "other" };
  }
  if (stream.mediaEnded) {
    return { title: "The camera stopped", text: "It was unplugged, or its permission taken back.", act: "restart" };
  }
  if (view.paused) return { title: "Paused", text: "Press space to go on.", quiet: true };
  if (view.state === "recovering") {
    return { title: "Recovering", text: "A part of the machine stopped. The stream goes on by itself in a moment." };
  }
  if (stream.lost) {
    return { title: "The source is silent", text: `${stream.lost} It goes on as soon as pictures come again.` };
  }
  if (stream.listening) return { title: "Waiting for the push", text: `Send RTMP to ${stream.listening}`, act: "copy" };
  if (player.state === "held" && performance.now() - player.shown > 2500) {
    return { title: "No new picture", text: "The last one stands while the connection is made again." };
  }
  if (!player.frames && performance.now() - stream.born > 8000) {
    return { title: "The first picture takes long", text: "The machine may be busy, or the source has not begun. It comes by itself." };
  }
  return null;
}
