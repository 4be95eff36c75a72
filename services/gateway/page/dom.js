// The few things every part does with the document.

/** The element with this id. */
export const $ = (id) => document.getElementById(id);

/** A new element: properties, then children. ``class``, ``data-…`` and ``aria-…`` are set as attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** The drawing with this name, from the sprite in the document. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Say something to a screen reader. */
export function announce(text) {
  $("announce").textContent = text;
}

/** A line in the corner that goes by itself, unless the pointer or the focus rests on it. */
export function toast(text, { action = null, stay = 6000 } = {}) {
  for (const old of $("toasts").children) if (old.firstChild.textContent === text) old.remove();
  const line = make("div", { class: "toast" }, make("p", {}, text));
  if (action) line.append(action);
  const close = make("button", { class: "icon small", type: "button", "aria-label": "Dismiss" }, icon("close"));
  close.onclick = () => line.remove();
  line.append(close);
  $("toasts").append(line);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  const go = () => (line.matches(":hover, :focus-within") ? setTimeout(go, 1500) : line.remove());
  if (stay) setTimeout(go, stay);
  return line;
}

/** Open a dialog; resolves to true when it was answered with "ok". */
export function ask(id) {
  const dialog = $(id);
  return new Promise((resolve) => {
    dialog.returnValue = "";
    for (const button of dialog.querySelectorAll("[data-close]")) button.onclick = () => dialog.close("");
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

/** Hand a file to the user. */
export function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Remember a choice across visits; forbidden storage is no error. */
export const choices = {
  get(name, fallback = "") {
    try {
      return localStorage.getItem(`rheocast.${name}`) ?? fallback;
    } catch {
      return fallback;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`rheocast.${name}`, value);
    } catch {
      // It holds for this visit.
    }
  },
};

/** A time stamp for file names. */
export const stamp = () => new Date().toISOString().slice(0, 19).replaceAll(":", "-");
