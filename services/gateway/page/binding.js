// What is pressed, typed and dragged, and where things stand on a narrow screen. The page itself is in main.js.

import { api } from "./api.js";
import { $, choices } from "./dom.js";
import { listen, movable } from "./keys.js";
import { drawScene, sceneCanvas, sketchScene } from "./scene.js";

const narrow = matchMedia("(max-width: 760px)");
const OURS = ["camera", "screen", "sample"]; // such a stream is nobody's once its page is gone

/** Connect the document to the page's parts. Called once. */
export function bind(page) {
  bindButtons(page);
  bindKeys(page);
  bindWindow(page);
  layOut();
  welcomePicture();
}

function bindButtons(page) {
  $("use-camera").onclick = () => page.begin("camera");
  $("try-sample").onclick = () => page.begin("sample");
  $("new-stream").onclick = () => page.begin(page.kind ?? "camera", { fresh: true });
  for (const button of document.querySelectorAll("[data-kind]")) button.onclick = () => page.begin(button.dataset.kind);
  $("cameras").onchange = () => {
    choices.set("camera", $("cameras").value);
    page.begin("camera");
  };
  $("drawer-pull").onclick = () => {
    const open = $("drawer-pull").getAttribute("aria-expanded") !== "true";
    $("drawer-pull").setAttribute("aria-expanded", open);
  };
}

function bindKeys(page) {
  listen({
    space: () => page.picture.pause(),
    Enter: () => page.prompt.send(),
    r: () => page.picture.record(),
    f: () => page.picture.fullScreen(),
    c: () => page.picture.compare(),
    g: () => page.grid.toggle(),
    "?": () => $("open-help").click(),
    Escape: () => page.grid.toggle(false),
    digit: (index) => page.chips.press(index),
  });
}

function bindWindow(page) {
  movable($("source-frame"), () => narrow.matches);
  narrow.onchange = () => layOut();
  addEventListener("online", () => page.streams.forEach((stream) => stream.reached(true)));
  addEventListener("offline", () => page.streams.forEach((stream) => stream.reached(false)));
  addEventListener("pagehide", () => {
    for (const stream of page.streams) {
      const ours = OURS.includes(stream.kind);
      if (ours && !stream.ended) api.remove(stream.id, true).catch(() => {});
      stream.close(!ours);
    }
  });
  // A page that the browser kept and shows again has let go of its streams: begin anew.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

// On a phone what chooses the source is in the drawer, and the source floats over the result.
function layOut() {
  const parts = [document.querySelector(".kinds"), $("camera-pick"), $("tiles")];
  if (narrow.matches) $("drawer").prepend(...parts);
  else $("side").append(...parts);
  $("source-frame").removeAttribute("style");
}

function welcomePicture() {
  for (const [draw, side] of [[drawScene, "scene"], [sketchScene, "scene drawn"]]) {
    const canvas = sceneCanvas(1440, 900, { draw });
    canvas.className = side;
    canvas.setAttribute("aria-hidden", "true");
    $("picture").append(canvas);
  }
}
