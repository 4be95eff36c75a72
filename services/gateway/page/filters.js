// Small drawings of the named styles for the chips: what a style will roughly look like, made from the user's own frame.
// They are pictures of 96×60, computed in a few milliseconds each; the real thing comes from the model.

const clamp = (v, low = 0, high = 1) => (v < low ? low : v > high ? high : v);

function luma(pixels, n) {
  const grey = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    grey[i] = (0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2]) / 255;
  }
  return grey;
}

// Two passes of a running mean: close to a Gaussian, and its cost does not depend on the radius.
function blur(field, width, height, radius) {
  const out = Float32Array.from(field);
  const line = new Float32Array(Math.max(width, height));
  const pass = (start, stride, count) => {
    let sum = 0;
    const at = (k) => out[start + clamp(k, 0, count - 1) * stride];
    for (let k = -radius; k <= radius; k++) sum += at(k);
    for (let k = 0; k < count; k++) {
      line[k] = sum / (2 * radius + 1);
      sum += at(k + radius + 1) - at(k - radius);
    }
    for (let k = 0; k < count; k++) out[start + k * stride] = line[k];
  };
  for (let y = 0; y < height; y++) pass(y * width, 1, width);
  for (let x = 0; x < width; x++) pass(x, width, height);
  return out;
}

// Contours, relative to the slopes around them: a dim scene is drawn as firmly as a bright one.
function lines(grey, width, height, strength) {
  const soft = blur(grey, width, height, 1);
  const slope = new Float32Array(grey.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const left = soft[y * width + Math.max(0, x - 1)];
      const right = soft[y * width + Math.min(width - 1, x + 1)];
      const up = soft[Math.max(0, y - 1) * width + x];
      const down = soft[Math.min(height - 1, y + 1) * width + x];
      slope[y * width + x] = Math.hypot(right - left, down - up);
    }
  }
  const around = blur(slope, width, height, 8);
  return slope.map((v, i) => {
    const t = clamp((v * strength) / (around[i] + 0.05) / 1.1 - 0.5);
    return t * t * (3 - 2 * t);
  });
}

function ramp(stops, value) {
  const place = clamp(value) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  const part = place - low;
  return stops[low].map((v, c) => v + (stops[low + 1][c] - v) * part);
}

const mix = (a, b, t) => a.map((v, c) => v + (b[c] - v) * t);
const grade = (stops) => (p) => ramp(stops, p.grey);
const steps = (v, n) => Math.round(clamp(v) * n) / n;
const saturated = (p, amount) => p.rgb.map((v) => clamp(p.grey + (v - p.grey) * amount));

// One pixel of each style, from {rgb, grey, soft (blurred grey), line, x, y}.
const STYLES = {
  pencil: (p) => {
    const shade = clamp((p.grey + 0.08) / (p.wide + 0.08)) ** 2 * (1 - 0.75 * p.line) * (0.8 + 0.22 * p.soft);
    return [0.98 * shade, 0.965 * shade, 0.93 * shade];
  },
  ink: (p) => Array(3).fill(1 / (1 + Math.exp(-(p.grey - 0.6 * p.wide - 0.16) * 20))),
  blueprint: (p) => mix([0.03, 0.16, 0.47].map((v) => v * (0.65 + 0.6 * p.soft)), [0.92, 0.97, 1], p.line),
  neon: (p) => mix([0.05, 0.01, 0.11], mix([0.05, 0.95, 1], [1, 0.1, 0.85], clamp((p.wide - 0.25) * 2.5)), p.line),
  thermal: grade([[0, 0, 0.12], [0.22, 0, 0.55], [0.72, 0.05, 0.5], [0.98, 0.35, 0.08], [1, 0.8, 0.1], [1, 1, 0.8]]),
  sepia: (p) => [1.08, 0.88, 0.62].map((v) => clamp((p.grey * 0.82 + 0.1) * v)),
  "night vision": grade([[0, 0.05, 0.01], [0.02, 0.42, 0.08], [0.15, 0.85, 0.25], [0.75, 1, 0.7]]),
  comic: (p) => {
    const flat = saturated(p, 1.9).map((v) => steps(v, 4));
    return mix(mix([0.13, 0.08, 0.36], flat, clamp(p.soft * 3)), [0.02, 0.02, 0.05], p.line);
  },
  watercolour: (p) => saturated(p, 1.5).map((v) => clamp(1 - (1 - v) * 0.55 - 0.12 * p.line)),
  vaporwave: grade([[0, 0.12, 0.3], [0, 0.55, 0.62], [0.95, 0.45, 0.75], [1, 0.9, 0.95]]),
  "x-ray": (p) => ramp([[0, 0.02, 0.06], [0.3, 0.46, 0.56], [0.88, 0.98, 1]], (1 - p.grey) ** 1.3),
  "pixel art": (p) => p.cell.map((v) => steps((v - 0.5) * 1.4 + 0.5, 4)),
  "pop art": (p) => ramp([[0.07, 0.16, 0.62], [0.9, 0.13, 0.3], [1, 0.83, 0.1], [0.99, 0.97, 0.86]], steps(p.soft, 3)),
  aurora: grade([[0.06, 0.02, 0.2], [0.34, 0.1, 0.6], [0.08, 0.62, 0.66], [0.45, 0.97, 0.6], [0.93, 1, 0.86]]),
  "stained glass": (p) => {
    const near = (v) => Math.abs(v - Math.round(v)) * 9;
    const lead = Math.min(near((p.x + p.y) / 9), near((p.x - p.y) / 9));
    return p.cell.map((v) => clamp((v - 0.4) * 2.2 + 0.5) * (0.15 + 0.85 * clamp(lead - 0.3)));
  },
};

/** Names that {@link drawStyle} knows. */
export const KNOWN = Object.keys(STYLES);

/** Mean colour of each 6×6 cell, for the styles that are made of cells. */
function cells(pixels, width, height) {
  const size = 6;
  const across = Math.ceil(width / size);
  const sums = new Float32Array(across * Math.ceil(height / size) * 4);
  for (let i = 0; i < width * height; i++) {
    const c = (Math.floor(Math.floor(i / width) / size) * across + Math.floor((i % width) / size)) * 4;
    for (let k = 0; k < 3; k++) sums[c + k] += pixels[4 * i + k] / 255;
    sums[c + 3] += 1;
  }
  return (x, y) => {
    const c = (Math.floor(y / size) * across + Math.floor(x / size)) * 4;
    return [sums[c] / sums[c + 3], sums[c + 1] / sums[c + 3], sums[c + 2] / sums[c + 3]];
  };
}

/** Redraw an ImageData in the named style. An unknown style leaves it as it is. */
export function drawStyle(name, image) {
  const shade = STYLES[name];
  if (!shade) return image;
  const { data, width, height } = image;
  const n = width * height;
  const grey = luma(data, n);
  const soft = blur(grey, width, height, 1);
  const wide = blur(grey, width, height, 6);
  const line = lines(grey, width, height, 0.9);
  const cell = cells(data, width, height);
  const out = new ImageData(width, height);
  for (let i = 0; i < n; i++) {
    const x = i % width;
    const y = Math.floor(i / width);
    const rgb = [data[4 * i] / 255, data[4 * i + 1] / 255, data[4 * i + 2] / 255];
    const point = { rgb, grey: grey[i], soft: soft[i], wide: wide[i], line: line[i], cell: cell(x, y), x, y };
    const colour = shade(point);
    for (let k = 0; k < 3; k++) out.data[4 * i + k] = 255 * clamp(colour[k]);
    out.data[4 * i + 3] = 255;
  }
  return out;
}
