// Runs before the first paint, so that the chosen theme never flashes. Not a module: modules wait for the document.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("rheocast.theme");
  } catch {
    // Storage may be forbidden: the system's choice then holds.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
