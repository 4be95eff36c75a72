// A second stream may have to be smaller than the first: ask what fits before asking for it.

import { api } from "./api.js";
import { toast } from "./dom.js";

const SMALLER = [[256, 160], [192, 112], [160, 96]];
const USUAL_FPS = 16; // of a source that has not told its rate

const asked = (spec, [width, height], fps) => {
  const question = { fps, steps: spec.steps, deadline_ms: spec.deadline_ms };
  if (spec.model) question.model = spec.model;
  return width ? { ...question, width, height } : question;
};

/** ``spec``, or as much of it as would be let in now: fewer steps and frames first, then a smaller picture. */
export async function fitting(spec) {
  const sizes = [[spec.width, spec.height], ...SMALLER.filter(([width]) => !spec.width || width < spec.width)];
  for (const size of sizes) {
    const told = await api.capacity(asked(spec, size, spec.fps ?? USUAL_FPS)).catch(() => null);
    if (!told) return spec; // the start itself will say why
    const fits = (told.tiers ?? []).find(({ more, tier }) => more > 0 && tier.fps >= spec.min_fps);
    if (!fits) continue;
    const { tier } = fits;
    if (size === sizes[0] && fits === told.tiers[0]) return spec;
    if (size !== sizes[0]) toast(`The machine is nearly full: this stream starts at ${tier.width}×${tier.height}.`);
    return { ...spec, steps: tier.steps, fps: tier.fps, width: tier.width, height: tier.height, min_fps: Math.min(spec.min_fps, tier.fps) };
  }
  return spec;
}
