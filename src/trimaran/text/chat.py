"""Messages -> tokens, with two promises.

- What a message says is never read as a control token, whoever wrote it: "<|im_end|>" in a question stays text.
- The tokens that a model would generate are marked (`spans`), and no token straddles their border, so the ids before
  a span are the ids that generation starts from.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix
from typing import Any

import jinja2

from trimaran.errors import Refusal
from trimaran.text.template import NEMOTRON_3, Message, compiled, fill, render
from trimaran.text.tokenizer import Tokenizer

__all__ = ["EncodedChat", "answer_prompts", "encode_chat", "render"]

Span = tuple[int, int]
CHANGED = ("thinking", "tools", "generation_prompt")  # options that `generation_prompts` sets itself

OWN_THOUGHTS = re.compile(r"\s*(<think>)(?:(?!</?think>).)*(</think>)", re.DOTALL)  # a pair that opens the content
GENERATION = (
    "\ufdd0",
    "\ufdd1",
)  # stand round the block of {% generation %}; hidden in messages, as control tokens are


@dataclass(frozen=True)
class EncodedChat:
    """ids, and per assistant message (start, stop) of what the model says, its end-of-turn token included."""

    ids: list[int]
    spans: list[Span]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    template: str | None = None,
    **options: Any,
) -> EncodedChat:
    """Tokens of the chat by the tokenizer's own template; `options` as in `render`.

    Control tokens come from the template alone, but for a pair of think tags that opens an assistant's content.
    """
    template = template or tokenizer.template or NEMOTRON_3.read_text(encoding="utf-8")
    for role in ("bos_token", "eos_token", "pad_token"):
        options.setdefault(role, tokenizer.config.get(role) or "")
    mask = Mask(tokenizer, [messages, options, template])
    masked = mask.messages(messages)
    options = {name: value if name.endswith("_token") else mask.hide(value) for name, value in options.items()}
    marked = compiled(template, marks=GENERATION)
    text = fill(marked, masked, options | {"generation_prompt": generation_prompt})
    text, spans = spans_of(text, tokenizer, masked, marked, options)
    return mask.encode(text, spans)


@lru_cache(maxsize=8)
def hidden_names(controls: tuple[str, ...]) -> tuple[list[str], re.Pattern[str]]:
    """(names to hide, longest first, what finds them)."""
    names = sorted([*controls, *GENERATION], key=len, reverse=True)
    return names, re.compile("|".join(map(re.escape, names)))


class Mask:
    """Hides the names of control tokens in message text from the template and the tokenizer, until both are done.

    A name becomes its number between two copies of a sign that nothing else in the chat contains.
    """

    def __init__(self, tokenizer: Tokenizer, everything: Any):
        self.tokenizer = tokenizer
        self.names, self.control = hidden_names(tuple(tokenizer.controls))
        used = json.dumps(everything, ensure_ascii=False, default=str)
        self.sign = next(sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in used)
        self.hidden = re.compile(f"{self.sign}([0-9]+){self.sign}")

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [self.message(message) for message in messages]

    def message(self, message: Message) -> dict[str, Any]:
        masked = {key: value if key == "role" else self.hide(value) for key, value in message.items()}
        content = message.get("content")
        own = OWN_THOUGHTS.match(content) if message.get("role") == "assistant" and isinstance(content, str) else None
        if content is not None and own is not None:
            opens, closes = own.start(1), own.start(2)
            inside, after = content[opens + len("<think>") : closes], content[closes + len("</think>") :]
            masked["content"] = f"{content[:opens]}<think>{self.hide(inside)}</think>{self.hide(after)}"
        return masked

    def hide(self, value: Any) -> Any:
        """`value` with every string in it masked, keys of tables included."""
        if isinstance(value, str):
            return self.control.sub(lambda found: f"{self.sign}{self.names.index(found[0])}{self.sign}", value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(inner) for inner in value]
        return value

    def show(self, text: str) -> str:
        shown = self.hidden.sub(lambda found: self.names[int(found[1])], text)
        if self.sign in shown:
            raise Refusal(
                "a chat template that cuts messages apart", "one that keeps them whole", "change the template"
            )
        return shown

    def encode(self, text: str, spans: list[Span]) -> EncodedChat:
        """Tokens of a rendered text; `spans` in characters of it become spans of tokens."""
        ids: list[int] = []
        token_at: dict[int, int] = {}
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        for start, stop in pairwise(borders):
            token_at[start] = len(ids)
            for piece, is_control in self.pieces(text[start:stop]):
                ids += [self.tokenizer.controls[piece]] if is_control else self.tokenizer.encode(self.show(piece))
        token_at[len(text)] = len(ids)
        return EncodedChat(ids, [(token_at[start], token_at[stop]) for start, stop in spans])

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """(text, False) and (control token, True), in turn."""
        at = 0
        for found in self.control.finditer(text):
            if found.start() > at:
                yield text[at : found.start()], False
            yield found[0], True
            at = found.end()
        if at < len(text):
            yield text[at:], False


def spans_of(
    text: str, tokenizer: Tokenizer, messages: Sequence[Message], template: jinja2.Template, options: dict[str, Any]
) -> tuple[str, list[Span]]:
    """(text without generation marks, spans in it of what the assistant says), in characters.

    A template with `{% generation %}` says so itself. Otherwise a span starts after what the template would prompt
    generation with, and ends with the next token that stops it.
    """
    if GENERATION[0] in text:
        return marked_spans(text)
    wanted = sum(message.get("role") == "assistant" for message in messages)
    end = turn_end(tokenizer)
    spans, at = [], 0
    prompt = re.compile("|".join(map(re.escape, beginnings(tokenizer, template, options) if wanted else ())) or r"(?!)")
    while (found := prompt.search(text, at)) and (stop := end.search(text, found.end())):
        spans.append((found.end(), stop.end()))
        at = stop.end()
    if len(spans) != wanted:
        unlike = f"{len(spans)} answers found in {wanted} assistant messages"
        raise Refusal(unlike, "one in each", "mark them in the chat template with {% generation %}")
    return text, spans


def turn_end(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the tokens that end a turn or a text."""
    stops = tokenizer.stop_ids
    ends = [name for name, identity in tokenizer.controls.items() if identity in stops]
    return re.compile("|".join(map(re.escape, ends)) or r"(?!)")


def answer_prompts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """How answers begin by the tokenizer's own template, before the model's own words, longest first: one way where it
    cannot turn thinking off, none where it has no generation prompt."""
    source = tokenizer.template or NEMOTRON_3.read_text(encoding="utf-8")
    roles = {f"{role}_token": tokenizer.config.get(f"{role}_token") or "" for role in ("bos", "eos", "pad")}
    return beginnings(tokenizer, compiled(source, marks=GENERATION), roles)


def beginnings(tokenizer: Tokenizer, template: jinja2.Template, options: Mapping[str, Any]) -> tuple[str, ...]:
    """`generation_prompts` that no message can spell: those with a control token."""
    settings = {name: value for name, value in options.items() if name not in CHANGED}
    plain = all(value is None or isinstance(value, str | int | float) for value in settings.values())
    ask = generation_prompts if plain else generation_prompts.__wrapped__  # what cannot be hashed is not remembered
    prompts = ask(template, tuple(sorted(settings.items())), turn_end(tokenizer))
    return tuple(prompt for prompt in prompts if any(name in prompt for name in tokenizer.controls))


@lru_cache(maxsize=64)
def generation_prompts(
    template: jinja2.Template, options: tuple[tuple[str, Any], ...], end: re.Pattern[str]
) -> tuple[str, ...]:
    """How an answer may begin before the model's own words, longest first: thinking, not thinking, what both share.

    A template that ignores `add_generation_prompt` may prompt always: then it is all that follows the question's end.
    """
    question = [{"role": "user", "content": "?"}]
    endings = []
    for thinking in (True, False):
        settings = dict(options) | {"thinking": thinking, "tools": None}
        without = fill(template, question, settings | {"generation_prompt": False})
        prompt = fill(template, question, settings | {"generation_prompt": True}).removeprefix(without)
        ended = end.search(without) is not None
        endings.append(prompt or (end.split(without)[-1] if ended else ""))
    shared = commonprefix(endings)  # noqa: RUF071 (characters are what is meant)
    return tuple(sorted({*endings, shared}, key=len, reverse=True))


def marked_spans(text: str) -> tuple[str, list[Span]]:
    """Takes the generation marks out and returns where they were."""
    opens, closes = GENERATION
    spans, kept = [], ""
    for part in text.split(opens):
        inside, mark, after = part.partition(closes)
        if mark:
            spans.append((len(kept), len(kept) + len(inside)))
        kept += inside + after
    return kept, spans
