// Markdown as elements. Text enters the document through text nodes only: whatever a model writes stays text.
//
// blocks(text) cuts a text into blocks; a block is rendered from its own source alone, so while an answer grows only
// its last block is drawn again. What is not understood is shown as it was written.

import { paint } from "./paint.js";

const DEPTH = 6; // lists and quotes inside one another; deeper ones are shown as written
const REACH = 2000; // characters over which emphasis or a link may stretch: keeps a line of 10,000 stars linear

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+)(?=\S)/;
const BORDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/; // the line under a table's head

/** [{kind, source, ...}] of a text, in order. */
export function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at);
    found.push({ ...block, source: lines.slice(at, next).join("\n") });
    at = next;
  }
  return found;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) {
    const end = until(lines, at, (next) => !QUOTE.test(next));
    return [{ kind: "quote", text: lines.slice(at, end).map((next) => next.replace(QUOTE, "")).join("\n") }, end];
  }
  if (ITEM.test(line)) return list(lines, at);
  if (startsTable(lines, at)) {
    const end = until(lines, at + 2, (next) => !next.includes("|"));
    return [{ kind: "table", head: line, border: lines[at + 1], rows: lines.slice(at + 2, end) }, end];
  }
  const end = until(lines, at + 1, (next, place) => interrupts(lines, place));
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

function until(lines, at, stops) {
  while (at < lines.length && lines[at].trim() && !stops(lines[at], at)) at += 1;
  return at;
}

function interrupts(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) ||
    startsTable(lines, at);
}

function startsTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && BORDER.test(lines[at + 1]);
}

function fenced(lines, at, [, indent, ticks, words]) {
  const close = new RegExp(`^ {0,3}\\${ticks[0]}{${ticks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent.length}}`), ""));
  return [{ kind: "code", language: words.trim().split(/\s/)[0], code: code.join("\n") }, Math.min(end + 1, lines.length)];
}

/** A run of items with the same kind of sign; what is indented below an item belongs to it. */
function list(lines, at) {
  const [, margin, sign] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(sign);
  const items = [];
  let loose = at;
  for (;;) {
    const item = ITEM.exec(lines[at] ?? "");
    if (!item || item[1].length > margin.length + 1 || /\d/.test(item[2]) !== ordered || RULE.test(lines[at])) break;
    const inset = item[1].length + item[2].length + Math.min(item[3].length, 4);
    const own = [lines[at].slice(inset)];
    at += 1;
    while (at < lines.length && belongs(lines, at, margin.length)) own.push(unindent(lines[at++], inset));
    items.push(own.join("\n"));
    loose = at;
    while (at < lines.length && !lines[at].trim()) at += 1; // blank lines between items end nothing
  }
  return [{ kind: "list", ordered, start: ordered ? Number.parseInt(sign, 10) : 1, items }, loose];
}

function belongs(lines, at, margin) {
  const line = lines[at];
  if (!line.trim()) return at + 1 < lines.length && /^\s/.test(lines[at + 1]) && indentOf(lines[at + 1]) > margin;
  if (indentOf(line) > margin) return true;
  return Boolean(lines[at - 1].trim()) && !interrupts(lines, at); // a paragraph's line that was not indented
}

const indentOf = (line) => line.length - line.trimStart().length;
const unindent = (line, inset) => line.slice(Math.min(indentOf(line), inset));

/** Brings `place` to show `text`, drawing again only from the first block that changed. Returns the blocks' elements. */
export function show(place, text) {
  const wanted = blocks(text);
  const had = [...place.children];
  let same = 0;
  while (same < wanted.length && same < had.length && had[same].source === wanted[same].source) same += 1;
  for (const [index, block] of wanted.entries()) {
    if (index < same) continue;
    if (block.kind === "code" && grow(had[index], block)) continue;
    const drawn = draw(block, 0);
    drawn.source = block.source;
    if (had[index]) had[index].replaceWith(drawn);
    else place.append(drawn);
  }
  for (const old of had.slice(wanted.length)) old.remove();
  return [...place.children];
}

/** A code block that became longer keeps its element, and with it how far it was scrolled. */
function grow(element, block) {
  if (element?.dataset.language !== block.language) return false;
  element.querySelector("code").replaceChildren(...paint(block.code, block.language));
  element.source = block.source;
  return true;
}

function draw(block, depth) {
  const deeper = (text) =>
    depth < DEPTH ? blocks(text).map((inner) => draw(inner, depth + 1)) : [element("p", {}, text)];
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text)); // the page has its own h1 and h2
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...deeper(block.text));
    case "list": {
      const items = block.items.map((item) => element("li", {}, ...tight(deeper(item))));
      return element(block.ordered ? "ol" : "ul", block.ordered && block.start !== 1 ? { start: block.start } : {}, ...items);
    }
    case "table":
      return table(block);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

/** An item that begins with a paragraph shows its words directly. */
function tight(children) {
  return children[0]?.tagName === "P" ? [...children[0].childNodes, ...children.slice(1)] : children;
}

function code({ language, code }) {
  const copy = element("button", { type: "button", className: "quiet copy-code" }, "Copy");
  const text = element("pre", { tabIndex: 0 }, element("code", {}, ...paint(code, language)));
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const figure = element("figure", { className: "code" }, element("figcaption", {}, element("span", {}, language), copy), text);
  figure.dataset.language = language;
  return figure;
}

function table({ head, border, rows }) {
  const sides = cells(border).map((cell) => (/^:-+:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : "left"));
  const row = (line, kind) => {
    const texts = cells(line);
    return element("tr", {}, ...sides.map((side, at) => element(kind, { className: side }, ...inline(texts[at] ?? ""))));
  };
  const body = element("tbody", {}, ...rows.map((line) => row(line, "td")));
  const whole = element("table", {}, element("thead", {}, row(head, "th")), body);
  const frame = element("div", { className: "table", tabIndex: 0 }, whole);
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table");
  return frame;
}

const cells = (line) =>
  line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

// Marks inside a line. Each is tried where its first sign stands; what fails is shown as written.
const SIGN = /[\\`*_~[!<]|https?:\/\//g;
const PAIRS = [["***", "strong", "em"], ["___", "strong", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const LINK = /^!?\[((?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\(\s*<?([^\s<>]*?)>?(?:\s+["'(][^\n]*?["')])?\s*\)/;
const ANGLE = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/;
const BARE = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?*_~)\]]/;

/** Nodes of one paragraph's text. */
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = 0;
  SIGN.lastIndex = 0;
  for (let sign = SIGN.exec(text); sign; sign = SIGN.exec(text)) {
    const at = sign.index;
    const [node, length] = markAt(text, at, depth) ?? [];
    SIGN.lastIndex = at + (length ?? sign[0].length); // deeper calls have moved it
    if (!length) continue;
    if (at > plain) nodes.push(document.createTextNode(text.slice(plain, at)));
    nodes.push(node);
    plain = SIGN.lastIndex;
  }
  if (plain < text.length) nodes.push(document.createTextNode(text.slice(plain)));
  return nodes;
}

/** [node, characters it took] of the mark that begins at `at`, or null. */
function markAt(text, at, depth) {
  const rest = text.slice(at, at + REACH);
  if (rest[0] === "\\") return /^\\[!-/:-@[-`{-~]/.test(rest) ? [document.createTextNode(rest[1]), 2] : null;
  if (rest[0] === "`") return codeSpan(rest);
  const angle = ANGLE.exec(rest);
  if (angle) return [link(angle[1], [angle[1]]), angle[0].length];
  const bare = BARE.exec(rest);
  if (bare) return [link(bare[0], [bare[0]]), bare[0].length];
  if (depth >= DEPTH) return null;
  const linked = rest[0] === "[" || rest[0] === "!" ? LINK.exec(rest) : null;
  if (linked) return [link(linked[2], inline(linked[1] || linked[2], depth + 1)), linked[0].length];
  return emphasis(text, at, rest, depth);
}

function codeSpan(rest) {
  const ticks = /^`+/.exec(rest)[0];
  const close = new RegExp(`[^\`](${ticks})(?!\`)`, "g");
  close.lastIndex = ticks.length;
  const end = close.exec(rest);
  if (!end) return [document.createTextNode(ticks), ticks.length];
  const inside = rest.slice(ticks.length, end.index + 1).replace(/^ (.*\S.*) $/s, "$1");
  return [element("code", {}, inside), end.index + 1 + ticks.length];
}

function emphasis(text, at, rest, depth) {
  for (const [sign, ...names] of PAIRS) {
    if (!rest.startsWith(sign) || !/^\S/.test(rest.slice(sign.length))) continue;
    if (sign[0] === "_" && /[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) return null; // snake_case is no emphasis
    const end = closes(rest, sign);
    if (end < 0) continue;
    const inside = inline(rest.slice(sign.length, end), depth + 1);
    return [names.reduceRight((inner, name) => [element(name, {}, ...inner)], inside)[0], end + sign.length];
  }
  return null;
}

function closes(rest, sign) {
  for (let end = rest.indexOf(sign, sign.length + 1); end >= 0; end = rest.indexOf(sign, end + 1)) {
    const before = rest[end - 1];
    const after = rest[end + sign.length] ?? "";
    const splits = sign.length === 1 && (before === sign || after === sign); // half of a longer sign
    const within = sign[0] === "_" && /[\p{L}\p{N}]/u.test(after);
    if (/\S/.test(before) && before !== "\\" && !splits && !within) return end;
  }
  return -1;
}

/** A link leads to web and mail addresses alone; any other (javascript:, data:) is shown as its words. */
function link(address, words) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return element("span", {}, ...words);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...words);
}

/** An element with properties and children; strings become text nodes. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
