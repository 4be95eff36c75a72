// Keys: one letter each, never while somebody types, and never instead of what a focused control does itself.

import { $ } from "./dom.js";

const TYPING = "input:not([type=range], [type=checkbox]), textarea, select, [contenteditable]";

/** ``acts``: functions by key; digits call ``acts.digit(index)``. */
export function listen(acts) {
  document.addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (document.querySelector("dialog[open]") || target.matches?.(TYPING)) {
      if (key === "Escape" && target.matches?.("textarea")) target.blur();
      return;
    }
    // A focused button takes the space bar itself, unless it is hidden by now, as one in a closed dialog is.
    if (key === " " && target.closest?.("button, summary, [type=checkbox]")?.checkVisibility()) return;
    if (key >= "1" && key <= "9") {
      acts.digit(Number(key) - 1);
    } else {
      const act = acts[key === " " ? "space" : key.length === 1 ? key.toLowerCase() : key];
      if (!act) return;
      act();
    }
    event.preventDefault();
  });
}

/** Let the small source picture be moved by dragging where it floats over the result; it stays inside. */
export function movable(element, floats) {
  let from = null;
  element.addEventListener("pointerdown", (event) => {
    if (!floats()) return;
    const box = element.getBoundingClientRect();
    from = { x: event.clientX - box.left, y: event.clientY - box.top };
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (!from) return;
    const room = $("result").getBoundingClientRect();
    const left = Math.min(room.width - element.offsetWidth - 8, Math.max(8, event.clientX - from.x - room.left));
    const top = Math.min(room.height - element.offsetHeight - 8, Math.max(8, event.clientY - from.y - room.top));
    Object.assign(element.style, { left: `${left}px`, top: `${top}px`, right: "auto" });
  });
  for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => (from = null));
}
