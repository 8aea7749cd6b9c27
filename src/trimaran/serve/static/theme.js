// Runs before the first paint, so that a chosen colour scheme does not flash.
"use strict";
try {
  const chosen = JSON.parse(localStorage.getItem("trimaran.theme"));
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch (problem) {
  if (!(problem instanceof SyntaxError) && problem.name !== "SecurityError") throw problem; // a browser that keeps nothing follows the system
}
