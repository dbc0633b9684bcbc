"use strict";
// In the head, before anything is painted: the theme that was chosen last.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  try { root.dataset.theme = localStorage.getItem("qvis-theme") || "auto"; } catch { root.dataset.theme = "auto"; }
})();
