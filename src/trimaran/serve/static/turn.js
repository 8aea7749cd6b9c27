// One turn on the page: the question, and the answer on show with its thought, its words and its soundings.

import { show } from "./markdown.js";
import { shown } from "./talk.js";

const number = new Intl.NumberFormat("en");
const GLIMPSE = 120; // characters of a running thought that its folded line shows

const plural = (count, word) => `${number.format(count)} ${word}${count === 1 ? "" : "s"}`;
const about = (answer, count) => `${answer.exact ? "" : "≈ "}${plural(count, "token")}`;

export class TurnView {
  /** acts: {edit(), again(), copy(text), turn(step)} of whoever keeps the conversation. */
  constructor(turn, acts) {
    this.turn = turn;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.element.classList.toggle("continued", turn.kind === "text");
    const on = (selector, act) => this.find(selector).addEventListener("click", act);
    on(".edit", () => acts.edit());
    on(".again", () => acts.again());
    on(".copy", (event) => acts.copy(shown(turn).content, event.currentTarget));
    on(".earlier", () => acts.turn(-1));
    on(".later", () => acts.turn(1));
    this.find(".asked").textContent = turn.question;
    this.find(".thought").addEventListener("toggle", () => this.thought(shown(turn)));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** live: its answer is being written. last: it can be edited and tried again. Returns the finished blocks of words. */
  draw({ live, last, name }) {
    const answer = shown(this.turn);
    this.live = live;
    this.element.classList.toggle("live", live);
    this.find(".answer").hidden = !answer;
    this.find(".answer").setAttribute("aria-busy", live);
    this.find(".answer .who").textContent = name;
    this.find(".edit").hidden = !last || live;
    if (!answer) return [];
    this.element.classList.toggle("waiting", live && !answer.reasoning && !answer.content);
    this.thought(answer);
    const drawn = this.words(answer);
    this.ending(answer, live);
    this.find(".copy").hidden = live || !answer.content;
    this.find(".again").hidden = live || !last;
    this.versions(live);
    this.find(".soundings").replaceChildren(...soundings(answer));
    return live ? drawn.slice(0, -1) : drawn;
  }

  words(answer) {
    const place = this.find(".words");
    if (this.turn.kind !== "text") return show(place, answer.content);
    const given = document.createElement("span");
    given.textContent = this.turn.question;
    place.replaceChildren(given, answer.content);
    return this.live ? [] : [place];
  }

  thought(answer) {
    const box = this.find(".thought");
    box.hidden = !answer.reasoning;
    if (!answer.reasoning) return;
    const running = this.live && !answer.content;
    box.classList.toggle("running", running);
    const limit = answer.budget ? ` of ${number.format(answer.budget)}` : "";
    const tokens = about(answer, answer.thoughts);
    this.find(".thought-name").textContent = running ? "Thinking" : "Thought";
    const seconds = answer.thinkingSeconds >= 0.05 ? `, ${answer.thinkingSeconds.toFixed(1)} s` : "";
    this.find(".thought-count").textContent = running ? tokens.replace(/ tokens?$/, `${limit} tokens`) : tokens + seconds;
    this.find(".glimpse").textContent = running ? answer.reasoning.slice(-GLIMPSE).replace(/\s+/g, " ") : "";
    this.scale(answer, running);
    if (box.open || !this.live) show(this.find(".thought-text"), answer.reasoning);
  }

  /** How much of its budget the thought has used, as the scale bar of a chart. */
  scale(answer, running) {
    const bar = this.find(".scale");
    bar.hidden = !running || !answer.budget;
    if (bar.hidden) return;
    bar.style.setProperty("--share", Math.min(1, answer.thoughts / answer.budget));
    bar.setAttribute("aria-label", `${answer.thoughts} of ${answer.budget} tokens of thought used`);
  }

  ending(answer, live) {
    const said = this.find(".problem");
    const words = live ? "" : ended(answer);
    said.textContent = words;
    said.hidden = !words;
    said.classList.toggle("grave", Boolean(answer.problem));
  }

  versions(live) {
    const { answers, shown: at } = this.turn;
    this.find(".versions").hidden = live || answers.length < 2;
    this.find(".which").textContent = `${at + 1} of ${answers.length}`;
    this.find(".earlier").disabled = at === 0;
    this.find(".later").disabled = at === answers.length - 1;
  }
}

/** Why an answer ended, where that is not plain from its words. */
function ended(answer) {
  if (answer.problem) return answer.problem;
  if (answer.stopped) return "Stopped.";
  if (answer.finish === "length" && !answer.content)
    return "The thought used up every token. A budget would leave some for the answer; so would more tokens.";
  if (answer.finish === "length") return "Cut off: the most tokens that were allowed.";
  if (!answer.content) return answer.reasoning ? "A thought, and no answer after it." : "An empty answer.";
  return "";
}

/** The numbers of an answer, as [dt, dd] pairs in divs. */
function soundings(answer) {
  const rows = [];
  if (answer.tokens) rows.push([answer.tokens === 1 ? "token" : "tokens", `${answer.exact ? "" : "≈ "}${number.format(answer.tokens)}`]);
  const rate = answer.rate ?? answer.live;
  if (rate) rows.push(["per second", rate < 10 ? rate.toFixed(1) : number.format(Math.round(rate))]);
  if (answer.drafted) rows.push(["drafts accepted", `${number.format(answer.accepted)} of ${number.format(answer.drafted)}`]);
  if (answer.cached) rows.push(["prompt from cache", `${number.format(answer.cached)} of ${number.format(answer.prompt)}`]);
  return rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(document.createElement("dt"), document.createElement("dd"));
    row.firstChild.textContent = name;
    row.lastChild.textContent = value;
    return row;
  });
}
