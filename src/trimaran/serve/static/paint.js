// Code in four inks: comments, strings, numbers, keywords. A sketch of a lexer, the same for every language.

const WORDS = {
  python:
    "and as assert async await break class continue def del elif else except finally for from global if import in is " +
    "lambda nonlocal not or pass raise return try while with yield match case None True False self",
  javascript:
    "async await break case catch class const continue default delete do else export extends false finally for from " +
    "function if import in instanceof let new null of return static super switch this throw true try typeof undefined " +
    "var void while yield interface type enum implements private public readonly",
  c:
    "auto bool break case char class const constexpr continue default delete do double else enum extern false float for " +
    "fn func go if impl import in inline int interface let long match mod mut namespace new null nullptr package pub " +
    "public private return short signed sizeof static struct super switch template this throw trait true try type " +
    "typedef union unsigned use using var virtual void where while",
  shell: "case do done elif else esac export fi for function if in local return then until while",
};
const FAMILY = {
  python: "python", py: "python", python3: "python", pycon: "python", toml: "python", yaml: "python", yml: "python",
  javascript: "javascript", js: "javascript", jsx: "javascript", ts: "javascript", typescript: "javascript", json: "javascript",
  c: "c", cpp: "c", "c++": "c", h: "c", cuda: "c", rust: "c", rs: "c", go: "c", java: "c", kotlin: "c", swift: "c", csharp: "c",
  sh: "shell", bash: "shell", shell: "shell", zsh: "shell", console: "shell",
};
const HASH = new Set(["python", "shell"]);
const LONGEST = 50000; // characters; beyond them code is shown in one ink

/** Nodes of a piece of code: text, and spans of class comment, string, number, keyword. */
export function paint(code, language) {
  const family = FAMILY[language.toLowerCase()];
  if (!family || code.length > LONGEST) return [code];
  const comment = HASH.has(family) ? "#[^\\n]*" : "\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)";
  const string = `"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?` +
    (family === "javascript" ? "|`(?:[^`\\\\]|\\\\.)*`?" : "");
  const parts = new RegExp(`(${comment})|(${string})|(\\b\\d[\\w.]*)|([\\p{L}_$][\\p{L}\\p{N}_$]*)`, "gu");
  const keywords = new Set(WORDS[family].split(" "));
  const nodes = [];
  let plain = 0;
  for (const found of code.matchAll(parts)) {
    const ink = found[1] ? "comment" : found[2] ? "string" : found[3] ? "number" : keywords.has(found[4]) ? "keyword" : "";
    if (!ink) continue;
    if (found.index > plain) nodes.push(code.slice(plain, found.index));
    const span = document.createElement("span");
    span.className = ink;
    span.textContent = found[0];
    nodes.push(span);
    plain = found.index + found[0].length;
  }
  nodes.push(code.slice(plain));
  return nodes;
}
