// The welcome's picture: a small landscape, painted on one side and drawn in pencil on the other, so that the page has
// something to show before any camera is on. The chips' first thumbnails are made from it, too.

const TURN = 2 * Math.PI;
const PAPER = "#f4f0e6";
const GRAPHITE = "#34332f";

function hill(width, height, base, swell, phase) {
  const path = new Path2D();
  path.moveTo(-9, height + 9);
  for (let x = -9; x <= width + 9; x += 6) {
    const u = (x / width) * TURN;
    path.lineTo(x, height * (base + swell * Math.sin(u + phase) + 0.4 * swell * Math.sin(2 * u + 1.7 * phase)));
  }
  path.lineTo(width + 9, height + 9);
  path.closePath();
  return path;
}

function polygon(...points) {
  const path = new Path2D();
  points.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
  return path;
}

const box = (x, y, w, h) => polygon([x, y], [x + w, y], [x + w, y + h], [x, y + h]);

function tree(x, y, size) {
  const shapes = [[box(x - size * 0.05, y - size * 0.3, size * 0.1, size * 0.34), "#4a3324", 0.3]];
  for (let k = 2; k >= 0; k--) {
    const top = y - size * (1 - 0.1 * k) + k * size * 0.16;
    const half = size * (0.17 + 0.06 * k);
    shapes.push([polygon([x, top], [x - half, top + size * 0.4], [x + half, top + size * 0.4]), ["#2f6b49", "#28603f", "#235537"][k], 0.25]);
  }
  return shapes;
}

/** Everything in the scene from back to front: [path, colour, brightness], at ``turn`` (0…1: once round). */
function shapesOf(width, height, turn) {
  const sun = new Path2D();
  sun.arc(width * 0.69, height * 0.24, height * 0.085, 0, TURN);
  const drift = turn * TURN;
  const [x, y, s] = [width * 0.385, height * 0.7, height * 0.24];
  return [
    [sun, "#fff0b8", 1],
    [hill(width, height, 0.42, 0.06, drift + 0.4), "#8796ae", 0.75],
    [hill(width, height, 0.52, 0.06, drift + 2.0), "#64917a", 0.6],
    [hill(width, height, 0.64, 0.045, drift + 4.1), "#86a653", 0.7],
    ...tree(width * 0.1, height * 0.72, height * 0.34),
    ...tree(width * 0.19, height * 0.74, height * 0.25),
    ...tree(width * 0.9, height * 0.7, height * 0.36),
    ...tree(width * 0.81, height * 0.75, height * 0.24),
    ...tree(width * 0.62, height * 0.69, height * 0.16),
    [box(x - s * 0.6, y - s * 0.6, s * 1.2, s * 0.62), "#dd9467", 0.8],
    [polygon([x - s * 0.76, y - s * 0.58], [x, y - s * 1.12], [x + s * 0.76, y - s * 0.58]), "#7a3131", 0.35],
    [box(x - s * 0.42, y - s * 0.42, s * 0.26, s * 0.24), "#fbe7a0", 1],
    [box(x + s * 0.12, y - s * 0.42, s * 0.24, s * 0.44), "#4a2c1d", 0.3],
    [hill(width, height, 0.8, 0.03, drift + 5.6), "#6d8c40", 0.55],
  ];
}

/** Paint the scene over the whole of a 2D context's canvas. */
export function drawScene(ctx, turn) {
  const { width, height } = ctx.canvas;
  const sky = ctx.createLinearGradient(0, 0, 0, height * 0.7);
  sky.addColorStop(0, "#5b86c4");
  sky.addColorStop(0.6, "#f0b48c");
  sky.addColorStop(1, "#f6d9b0");
  ctx.fillStyle = sky;
  ctx.fillRect(0, 0, width, height);
  for (const [path, colour] of shapesOf(width, height, turn)) {
    ctx.fillStyle = colour;
    ctx.fill(path);
  }
}

/** The same scene in pencil: paper, hatching where it is dark, each contour twice and not quite in the same place. */
export function sketchScene(ctx, turn) {
  const { width, height } = ctx.canvas;
  const unit = height / 700;
  ctx.fillStyle = PAPER;
  ctx.fillRect(0, 0, width, height);
  ctx.strokeStyle = GRAPHITE;
  ctx.lineJoin = ctx.lineCap = "round";
  shapesOf(width, height, turn).forEach(([path, , bright], index) => {
    ctx.save();
    ctx.clip(path);
    ctx.fillStyle = PAPER;
    ctx.fillRect(0, 0, width, height);
    ctx.globalAlpha = 0.16 + 0.4 * (1 - bright);
    ctx.lineWidth = 1.1 * unit;
    const gap = (3.5 + 12 * bright ** 2) * unit;
    const lean = 0.5 + 0.35 * (index % 3);
    if (bright < 0.95) {
      ctx.beginPath();
      for (let x = -height; x < width + height; x += gap) {
        ctx.moveTo(x + 3 * unit * Math.sin(x), height);
        ctx.lineTo(x + height * lean, 0);
      }
      ctx.stroke();
    }
    ctx.restore();
    for (const [dx, dy, alpha, thick] of [[0, 0, 0.85, 1.8], [1.6, -1.1, 0.45, 1.1]]) {
      ctx.save();
      ctx.translate(dx * unit, dy * unit);
      ctx.globalAlpha = alpha;
      ctx.lineWidth = thick * unit;
      ctx.stroke(path);
      ctx.restore();
    }
  });
}

/** A canvas of this size with the scene on it, painted or drawn. */
export function sceneCanvas(width, height, { turn = 0.2, draw = drawScene } = {}) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  draw(canvas.getContext("2d", { willReadFrequently: true }), turn);
  return canvas;
}
