// The conversation: turns of one question and the answers that were tried, the last shown unless another is chosen.

import { keep, kept } from "./store.js";

const VERSION = 1;

/** An answer before its first token. problem: why it broke off. exact: whether the server counted, or the page did. */
export const blank = () => ({
  reasoning: "", content: "", thoughts: 0, tokens: 0, exact: false, finish: null, stopped: false, problem: null,
  budget: null, thinkingSeconds: 0, rate: null, drafted: 0, accepted: 0, prompt: 0, cached: 0,
});

export class Talk {
  constructor() {
    this.turns = [];
    this.read();
  }

  /** Takes up what the browser kept, if it is of this page's making. */
  read() {
    const was = kept("talk");
    this.turns = was?.version === VERSION && Array.isArray(was.turns) ? was.turns.filter(sound) : [];
    for (const answer of this.turns.flatMap(({ answers }) => answers)) {
      if (!answer.finish && !answer.problem) answer.stopped = true; // the page was left while it was written
    }
  }

  /** Returns whether the browser keeps it. */
  save() {
    return keep("talk", { version: VERSION, turns: this.turns });
  }

  get last() {
    return this.turns.at(-1);
  }

  /** Adds a question, or puts it in the last one's place; its answers go with the old words. kind: chat or text. */
  ask(question, inPlace, kind) {
    if (inPlace) this.turns.pop();
    this.turns.push({ kind, question, answers: [], shown: -1 });
  }

  /** A new answer to the last question, shown from now on. One that came to nothing gives way to it. */
  begin(budget) {
    this.last.answers = this.last.answers.filter(({ reasoning, content }) => reasoning || content);
    const answer = { ...blank(), budget };
    this.last.answers.push(answer);
    this.last.shown = this.last.answers.length - 1;
    return answer;
  }

  /** What the server is told: earlier thoughts are left out, as the model's own template would. */
  messages(system) {
    const said = system.trim() ? [{ role: "system", content: system }] : [];
    for (const turn of this.turns) {
      said.push({ role: "user", content: turn.question });
      const answer = shown(turn);
      if (turn !== this.last && answer) said.push({ role: "assistant", content: answer.content });
    }
    return said;
  }

  markdown(name) {
    return this.turns
      .map((turn) => `**You:** ${turn.question}\n\n**${name}:** ${shown(turn)?.content ?? ""}\n`)
      .join("\n");
  }
}

/** The answer of a turn that is on show. */
export const shown = (turn) => turn.answers[turn.shown];

function sound(turn) {
  const texts = (answer) => typeof answer?.reasoning === "string" && typeof answer.content === "string";
  return typeof turn?.question === "string" && Array.isArray(turn.answers) && turn.answers.every(texts) &&
    Number.isInteger(turn.shown) && turn.shown < turn.answers.length;
}

/** Works one chunk of the stream into `answer`. now: seconds on any clock; first: when the first token came. */
export function absorb(answer, chunk, now, first) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const thought = delta.reasoning ?? delta.reasoning_content ?? "";
  const words = delta.content ?? choice?.text ?? "";
  answer.reasoning += thought.toWellFormed();
  answer.content += words.toWellFormed();
  if (thought) answer.thinkingSeconds = now - first;
  if (thought || words) {
    answer.tokens += 1; // until the server counts: a chunk has one token, or several after an accepted draft
    if (thought) answer.thoughts += 1;
  }
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  if (chunk.usage) count(answer, chunk.usage);
  if (first !== null && now > first && answer.rate === null) answer.live = (answer.tokens - 1) / (now - first);
}

function count(answer, usage) {
  const own = usage.x_trimaran ?? {};
  answer.tokens = usage.completion_tokens;
  answer.thoughts = usage.completion_tokens_details?.reasoning_tokens ?? answer.thoughts;
  answer.prompt = usage.prompt_tokens;
  answer.cached = usage.prompt_tokens_details?.cached_tokens ?? own.cached_tokens ?? 0;
  answer.exact = true;
  answer.drafted = own.drafted ?? 0;
  answer.accepted = own.accepted ?? 0;
  answer.rate = own.tokens_per_second ?? answer.rate;
}
