// A card over the welcome, or the picture: why nothing started, and what to do instead.

import { $, announce, make } from "./dom.js";

const NAMES = {
  camera: "Use my camera",
  sample: "Try a sample",
  file: "Open a file",
  url: "Paste an address",
  screen: "Share a screen",
};

/** Take the card away. */
export function unexplain() {
  document.querySelectorAll(".result > .note").forEach((old) => old.remove());
  $("welcome").hidden = document.documentElement.dataset.mode !== "welcome";
}

/** Say why a source of ``kind`` did not start: the error's title and words, and its ``others`` as buttons for ``begin``. */
export function explain(error, { kind, begin }) {
  const busy = error.status === 503 || error.status === 429;
  const title = error.title ?? (busy ? "Not now" : "That did not start");
  const others = error.others ?? [kind, ...["sample", "file"].filter((other) => other !== kind)];
  const acts = make("div", { class: "note-acts" });
  others.forEach((other, index) => {
    const label = other === kind ? "Try again" : NAMES[other];
    const button = make("button", { type: "button", class: index ? "quiet" : "primary" }, label);
    button.onclick = () => {
      unexplain();
      begin(other);
    };
    acts.append(button);
  });
  const card = make("div", { class: "note", role: "alertdialog", "aria-label": title });
  card.append(make("p", { class: "note-title" }, title), make("p", {}, error.message), acts);
  unexplain();
  $("welcome").hidden = true;
  $("result").append(card);
  acts.firstChild?.focus();
  announce(`${title}. ${error.message}`);
}
