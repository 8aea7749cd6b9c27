// What would keep someone from using the page as it stands: a list of words, empty when there is nothing.

const faults = [];
const root = document.querySelector("dialog[open]") ?? document.body;
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const seen = (one) => one.checkVisibility({ opacityProperty: true, visibilityProperty: true });
const named = (one) => `${one.tagName.toLowerCase()}${one.id ? `#${one.id}` : ""}.${one.className} ${one.textContent.slice(0, 30)}`;
const clipped = (one) => one.closest(".unseen, .store, .who, .bar .tool span, noscript, .contours");

function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}

function behind(one) {
  for (let place = one; place; place = place.parentElement) {
    const colour = rgba(getComputedStyle(place).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
}

// https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
function luminance([r, g, b]) {
  const [R, G, B] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * R + 0.7152 * G + 0.0722 * B;
}

function contrast(one) {
  const [dark, light] = [luminance(rgba(getComputedStyle(one).color)), luminance(behind(one))].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
}

const wide = document.documentElement.clientWidth; // innerWidth grows with what sticks out
if (document.documentElement.scrollWidth > wide) faults.push(`the page is ${document.documentElement.scrollWidth} wide of ${wide}`);

const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
const read = new Set();
while (walker.nextNode()) if (walker.currentNode.data.trim()) read.add(walker.currentNode.parentElement);
for (const one of read) {
  if (!seen(one) || clipped(one) || one.closest(":disabled, :has(> :disabled), option")) continue;
  const ratio = contrast(one);
  if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${named(one)}`);
  const box = one.getBoundingClientRect();
  if (box.width && (box.left < -1 || box.right > wide + 1) && !one.closest("pre, .table, .glimpse"))
    faults.push(`out of sight: ${named(one)}`);
}

for (const one of root.querySelectorAll("button, input, textarea, select, summary, a[href]")) {
  if (!seen(one) || one.closest(".skip, .prose a")) continue;
  const label = one.getAttribute("aria-label") ?? [...(one.labels ?? [])].map((each) => each.textContent).join(" ");
  if (!(label || one.textContent || one.title).trim()) faults.push(`nameless: ${named(one)}`);
  const box = (one.closest("label") ?? one).getBoundingClientRect();
  if (box.height < 24 || box.width < 24) faults.push(`${box.width.toFixed(0)} x ${box.height.toFixed(0)} is small: ${named(one)}`); // WCAG 2.5.8
}

const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
for (const id of ids.filter((id, at) => ids.indexOf(id) !== at)) faults.push(`two of #${id}`);
for (const name of ["for", "aria-labelledby", "aria-describedby"])
  for (const one of document.querySelectorAll(`[${name}]`))
    for (const id of one.getAttribute(name).split(" ")) if (!document.getElementById(id)) faults.push(`${name} leads nowhere: ${id}`);

return faults;
