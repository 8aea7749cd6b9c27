// The page: what is typed and pressed, what runs, what is shown.

import { apiKey, holdKey } from "./key.js";
import { Settings } from "./settings.js";
import { keep, kept } from "./store.js";
import { Talk, absorb, shown } from "./talk.js";
import { TurnView } from "./turn.js";
import { Failure, ask, models } from "./wire.js";

const $ = (id) => document.getElementById(id);
const SAVE_EVERY = 1000; // ms between savings while an answer is written
const NEAR = 120; // px from the end of the page within which it follows the answer
const SCHEMES = ["auto", "light", "dark"];

const settings = new Settings();
const talk = new Talk();
const views = new Map(); // turn -> TurnView
let running = null; // {controller, turn, first, saved} while an answer is written
let said = 0; // blocks of it that a screen reader was told
let leaving = false; // the browser breaks connections off before it says that the page is left
let editing = null; // the words that stood in the field before an edit, while one is under way
let follows = true; // the page scrolls along with the answer
let withKey = null; // what a key was asked for
let frame = 0;

// ---- drawing

function draw() {
  for (const [turn, view] of views) {
    if (talk.turns.includes(turn)) continue;
    view.element.remove();
    views.delete(turn);
  }
  for (const turn of talk.turns) {
    if (!views.has(turn)) {
      views.set(turn, new TurnView(turn, acts(turn)));
      $("turns").append(views.get(turn).element);
    }
    drawTurn(turn);
  }
  document.body.classList.toggle("started", talk.turns.length > 0);
  $("empty").hidden = talk.turns.length > 0;
  document.title = talk.turns.length ? `${talk.turns[0].question.slice(0, 40)} · Trimaran` : "Trimaran";
  reins();
}

function drawTurn(turn) {
  const live = running?.turn === turn;
  const finished = views.get(turn).draw({ live, last: turn === talk.last && !running, name: shortName() });
  if (live) say(finished);
}

/** Draws the running turn at most once a frame. */
function soon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!views.has(running?.turn)) return;
    drawTurn(running.turn);
    if (follows) toEnd();
    drawLatest();
  });
}

/** Finished blocks of words go to the screen reader's log, each once. */
function say(blocks) {
  for (const block of blocks.slice(said)) tell(block.textContent);
  said = Math.max(said, blocks.length);
}

function tell(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("said").append(line);
}

function reins() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("fresh").disabled = talk.turns.length === 0;
  $("editing").hidden = editing === null;
  $("question").placeholder = settings.base ? "Begin a text; the model goes on with it" : "Write a message";
  fit();
}

/** The field is as high as its words, up to what its style allows. */
function fit() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function toEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}

function drawLatest() {
  $("latest").hidden = beneath() <= NEAR;
}

const beneath = () => document.documentElement.scrollHeight - window.innerHeight - window.scrollY;

// ---- asking

async function run() {
  const answer = talk.begin(settings.budget);
  const controller = new AbortController();
  running = { controller, turn: talk.last, first: null, saved: performance.now() };
  said = 0;
  follows = true;
  $("said").replaceChildren();
  draw();
  toEnd();
  try {
    const [path, request] = settings.request(talk);
    for await (const chunk of ask(path, request, apiKey(), controller.signal)) take(answer, chunk);
    link("");
  } catch (problem) {
    fail(answer, problem);
  } finally {
    finish(answer);
  }
}

function take(answer, chunk) {
  const now = performance.now() / 1000;
  const had = answer.tokens;
  running.first ??= now;
  absorb(answer, chunk, now, running.first);
  if (!had) running.first = now; // seconds count from the first token, not from the role that comes before it
  if (performance.now() - running.saved > SAVE_EVERY) {
    running.saved = performance.now();
    save();
  }
  soon();
}

function fail(answer, problem) {
  if (problem.name === "AbortError" || leaving) {
    answer.stopped = true;
  } else if (problem instanceof Failure) {
    answer.problem = problem.retry ? `${problem.message} Try again in ${problem.retry} s.` : problem.message;
    if (problem.status === 401) askKey(problem.message, () => run());
    if (problem.status === 0 && !answer.tokens) link("unreachable");
  } else {
    answer.problem = "The page made a mistake; the browser’s console has the particulars.";
    throw problem;
  }
}

function finish(answer) {
  const { turn } = running;
  running = null;
  save();
  draw();
  if (follows) toEnd();
  drawLatest();
  if (!views.has(turn)) return; // a new conversation was begun
  say([...views.get(turn).find(".words").children]);
  tell(views.get(turn).find(".problem").textContent || `Answer finished, ${answer.tokens} tokens.`);
}

function save() {
  if (!talk.save()) notice("This browser keeps no more: the conversation will be gone after a reload.");
}

function stop() {
  running?.controller.abort();
}

function send() {
  const question = $("question").value;
  if (running || !question.trim() || !settings.check()) return;
  talk.ask(question.toWellFormed(), editing !== null, settings.base ? "text" : "chat");
  write(editing ?? "");
  editing = null;
  hush();
  run();
}

function write(words) {
  $("question").value = words;
  keep("draft", words || null);
  fit();
}

function acts(turn) {
  return {
    edit: beginEdit,
    again: () => running || run(),
    copy: (text, button) => copy(text, button),
    turn: (step) => {
      turn.shown += step;
      save();
      draw();
    },
  };
}

function beginEdit() {
  if (running || !talk.last) return;
  editing ??= $("question").value;
  $("question").value = talk.last.question;
  reins();
  $("question").focus();
}

function leaveEdit() {
  write(editing ?? "");
  editing = null;
  reins();
  $("question").focus();
}

function fresh() {
  const before = talk.turns;
  stop();
  if (editing !== null) leaveEdit();
  talk.turns = [];
  save();
  draw();
  $("question").focus();
  notice("A new conversation.", "Take it back", () => {
    talk.turns = [...before, ...talk.turns];
    save();
    draw();
    toEnd();
  });
}

// ---- key, models, notices

function useKey(key, lasting) {
  holdKey(key, lasting);
  $("forget-key").hidden = key === null;
}

function askKey(said, then) {
  $("key-said").textContent = apiKey() ? said : "Whoever started it knows the key.";
  withKey = then;
  if (!$("ask-key").open) $("ask-key").showModal();
}

async function meet() {
  try {
    settings.offer(await models(apiKey()));
    link("");
    hush();
  } catch (problem) {
    if (!(problem instanceof Failure)) throw problem;
    if (problem.status === 401) askKey(problem.message, meet);
    else {
      link("unreachable");
      notice(problem.message, "Try again", meet);
    }
  }
  introduce();
  draw();
}

function introduce() {
  $("ship").textContent = $("cartouche-name").textContent = shortName();
  const length = settings.model?.max_model_len;
  const about = settings.base ? ["A base model: it goes on with your text."] : [];
  if (length) about.push(`Reads and writes up to ${length.toLocaleString("en")} tokens.`);
  $("cartouche-about").textContent = about.join(" ");
}

const shortName = () => settings.model?.id.split("/").at(-1) || "Trimaran";

function link(words) {
  $("link").textContent = words;
  $("link").hidden = !words;
}

function notice(words, button = "", act = null) {
  const [text, press] = $("notice").children;
  text.textContent = words;
  press.textContent = button;
  press.hidden = !button;
  press.onclick = () => {
    hush();
    act();
  };
  $("notice").hidden = false;
}

function hush() {
  $("notice").hidden = true;
}

async function copy(text, button) {
  const label = button.textContent;
  button.textContent = (await copied(text)) ? "Copied" : "Could not copy";
  setTimeout(() => (button.textContent = label), 1500);
}

/** Whether the text reached the clipboard. Browsers give a page the new way over https and localhost alone. */
async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

function scheme(name) {
  const next = SCHEMES[(SCHEMES.indexOf(name) + 1) % SCHEMES.length];
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  keep("theme", name === "auto" ? null : name);
  $("theme-icon").setAttribute("href", `#i-${name}`);
  const words = { auto: "as the system", light: "light", dark: "dark" };
  $("theme").setAttribute("aria-label", `Colours: ${words[name]}. Press for ${words[next]}`);
  $("theme").title = `Colours: ${words[name]}`;
  $("theme").onclick = () => scheme(next);
}

// ---- what is pressed

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("question").addEventListener("input", () => {
  fit();
  if (editing === null) keep("draft", $("question").value || null);
});
$("question").addEventListener("keydown", (event) => {
  const touch = matchMedia("(pointer: coarse)").matches; // there Enter begins a line, and the button sends
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("question").value && talk.last) {
    event.preventDefault();
    beginEdit();
  }
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Escape" && editing !== null) leaveEdit();
  else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    $("question").focus();
  }
});
document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) copy(button.closest("figure").querySelector("code").textContent, button);
});
window.addEventListener("scroll", () => {
  follows = beneath() <= NEAR;
  drawLatest();
}, { passive: true });
window.addEventListener("beforeunload", () => (leaving = true));
window.addEventListener("pageshow", () => (leaving = false));
window.addEventListener("pagehide", () => running && save());
window.addEventListener("storage", (event) => {
  if (event.key !== "trimaran.talk" || running) return;
  talk.read(); // another window of this page went on with the conversation
  draw();
});

$("stop").addEventListener("click", () => {
  stop();
  $("question").focus();
});
$("leave-edit").addEventListener("click", leaveEdit);
$("fresh").addEventListener("click", fresh);
$("latest").addEventListener("click", () => {
  follows = true;
  toEnd();
});
$("open-settings").addEventListener("click", () => $("drawer").showModal());
$("close-settings").addEventListener("click", () => $("drawer").close());
$("drawer").addEventListener("click", (event) => event.target === $("drawer") && $("drawer").close());
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("model").addEventListener("input", () => {
  introduce();
  draw();
});
$("copy-talk").addEventListener("click", (event) => copy(talk.markdown(shortName()), event.currentTarget));
$("forget-key").addEventListener("click", () => useKey(null, false));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value, $("keep-key").checked);
  $("key").value = "";
  $("ask-key").close();
  withKey();
});
$("leave-key").addEventListener("click", () => $("ask-key").close());

scheme(SCHEMES.includes(kept("theme")) ? kept("theme") : "auto");
$("forget-key").hidden = apiKey() === null;
write(kept("draft") ?? "");
meet();
draw();
toEnd();
if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); // a phone's keyboard stays down
