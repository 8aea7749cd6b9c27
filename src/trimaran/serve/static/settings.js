// The settings drawer and the two reins under the message field. An empty field is left out of the request.

import { keep, kept } from "./store.js";

const BUDGETS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, null]; // tokens of thought; null: no limit
const TEXT_TOKENS = 256; // of a base model's text where no number is set: OpenAI's own default of 16 breaks off at once
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "system", "stop-texts", "model"];

const $ = (id) => document.getElementById(id);

export class Settings {
  constructor() {
    const was = kept("settings") ?? {};
    for (const id of FIELDS) if (typeof was[id] === "string" && id !== "model") $(id).value = was[id];
    $("thinking").checked = was.thinking !== false;
    $("budget").max = BUDGETS.length - 1;
    $("budget").value = BUDGETS.includes(was.budget) ? BUDGETS.indexOf(was.budget) : BUDGETS.length - 1;
    this.wanted = was.model;
    this.models = [];
    for (const id of [...FIELDS, "thinking", "budget"]) $(id).addEventListener("input", () => this.changed());
    this.reins();
  }

  changed() {
    const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
    this.wanted = values.model || this.wanted;
    keep("settings", { ...values, model: this.wanted, thinking: $("thinking").checked, budget: BUDGETS[$("budget").value] });
    this.reins();
  }

  /** The models on offer; the one chosen last stays chosen while it is among them. */
  offer(models) {
    this.models = models;
    $("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === this.wanted)));
    $("model").disabled = models.length < 2;
    this.reins();
  }

  get model() {
    return this.models.find(({ id }) => id === $("model").value);
  }

  /** A base model has learnt to go on with a text, not to converse. */
  get base() {
    return Boolean(this.model?.base);
  }

  get budget() {
    return this.base || !$("thinking").checked ? null : BUDGETS[$("budget").value];
  }

  reins() {
    const budget = BUDGETS[$("budget").value];
    $("budget").disabled = !$("thinking").checked;
    $("budget").style.setProperty("--at", $("budget").value / $("budget").max);
    $("budget").setAttribute("aria-valuetext", budget ? `${budget} tokens` : "no limit");
    const unit = document.createElement("span"); // a narrow page leaves it out
    unit.textContent = " tokens";
    $("budget-shown").replaceChildren(...(budget ? [budget.toLocaleString("en"), unit] : ["no limit"]));
    $("thinking-rein").hidden = $("budget-rein").hidden = this.base;
  }

  /** Whether every number can be sent; if not, the drawer opens at the first that cannot. */
  check() {
    const wrong = NUMBERS.map($).find((field) => !field.checkValidity());
    if (!wrong) return true;
    $("drawer").showModal();
    wrong.reportValidity();
    return false;
  }

  /** [path, body] of the request that continues `talk`. */
  request(talk) {
    const sampling = NUMBERS.filter((id) => $(id).value !== "").map((id) => [id, Number($(id).value)]);
    const stop = $("stop-texts").value.split("\n").filter((line) => line);
    const shared = {
      ...(this.model ? { model: this.model.id } : {}),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      ...Object.fromEntries(sampling),
      ...(stop.length ? { stop } : {}),
    };
    if (this.base) return ["v1/completions", { max_tokens: TEXT_TOKENS, ...shared, prompt: talk.last.question }];
    const budget = this.budget === null ? {} : { thinking_token_budget: this.budget };
    const options = { chat_template_kwargs: { enable_thinking: $("thinking").checked } };
    return ["v1/chat/completions", { ...shared, messages: talk.messages($("system").value), ...options, ...budget }];
  }
}
