"""Conversations as tokens, each token marked as learnt or only read.

An example ends with the last token that is learnt. Its first token is never a target, so that an example of n tokens
takes n - 1 places of a row.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimaran.data.messages import Chat, at
from trimaran.errors import Refusal
from trimaran.text.chat import answer_prompts, encode_chat
from trimaran.text.tags import THINK_CLOSE, THINK_OPEN
from trimaran.text.tokenizer import Tokenizer

QUESTION, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
MARKED = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Examples:
    """Examples end to end: ids_N int32, learnt_N bool; example e is starts[e] to starts[e + 1]. starts: int64."""

    ids_N: np.ndarray
    learnt_N: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learnt) of one example."""
        span = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids_N[span], self.learnt_N[span]

    @property
    def places(self) -> np.ndarray:
        """How many places of a row each example takes."""
        return np.diff(self.starts) - 1

    @property
    def digest(self) -> str:
        """sha256 of all of it: equal digests give equal batches."""
        whole = hashlib.sha256()
        for array in (self.ids_N, self.learnt_N, self.starts):
            whole.update(array.tobytes())
        return whole.hexdigest()

    def keep(self, chosen: np.ndarray) -> "Examples":
        """Those for which `chosen` is true."""
        return gathered([self[number] for number in np.flatnonzero(chosen).tolist()])


def gathered(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Single examples, (ids, learnt) each, end to end."""
    ids, learnt = ([pair[part] for pair in examples] for part in (0, 1))
    lengths = [len(one) for one in ids]
    return Examples(
        np.concatenate([np.zeros(0, np.int32), *ids]),
        np.concatenate([np.zeros(0, bool), *learnt]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )


def encode(chats: Sequence[Chat], tokenizer: Tokenizer, *, keep_thoughts: bool = False) -> Examples:
    """Every conversation as one example. Raises Refusal, with its place, for one that the template does not take."""
    check_template(tokenizer)
    thoughtful = next((chat for chat in chats if chat.thinks), None)
    if thoughtful is not None and not shows_thoughts(tokenizer):
        found = f"{thoughtful.place}: a thought, and a chat template that leaves it out"
        step = 'add "thinking": false to the rows, or change chat_template.jinja'
        raise Refusal(found, "a template that writes reasoning_content", step)
    return gathered([example(chat, tokenizer, keep_thoughts) for chat in chats])


def check_template(tokenizer: Tokenizer, *, switch: bool = False) -> None:
    """Refuses a template by which generation would begin elsewhere than learnt answers do; with `switch`, one that
    cannot turn thinking off."""
    prompts = answer_prompts(tokenizer)
    if not prompts and not MARKED.search(tokenizer.template or ""):
        found = "a chat template without a generation prompt"
        step = "write what add_generation_prompt adds into chat_template.jinja"
        raise Refusal(found, "one that begins the assistant's answer with a control token", step)
    if switch and len(prompts) < 2:
        found = "a chat template that begins all answers alike"
        raise Refusal(found, "one that reads enable_thinking", "set data.reasoning_off = 0, or change the template")
    prompt = encode_chat(tokenizer, [QUESTION], generation_prompt=True, thinking=False).ids
    said = encode_chat(tokenizer, [QUESTION, ANSWER], thinking=False)
    before = [said.ids[:start] for start, _ in said.spans]
    if before != [prompt]:
        found = f"a chat template whose prompt ends with {tokenizer.decode(prompt[-8:])!r}, unlike what answers follow"
        step = "let {% generation %} begin where add_generation_prompt ends"
        raise Refusal(found, "answers that begin where the generation prompt ends", step)


def shows_thoughts(tokenizer: Tokenizer) -> bool:
    """Whether the template writes the thought of a last answer."""
    bare, full = (encode_chat(tokenizer, [QUESTION, ANSWER | more]).ids for more in ({}, {"reasoning_content": "?"}))
    return bare != full


def example(chat: Chat, tokenizer: Tokenizer, keep_thoughts: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, learnt bool) of one conversation."""
    with at(chat.place):
        encoded = encode_chat(
            tokenizer,
            chat.messages,
            tools=list(chat.tools),
            thinking=chat.thinking,
            budget=chat.budget,
            effort=chat.effort,
            keep_thoughts=keep_thoughts,
        )
        answers = [learnt for message, learnt in zip(chat.messages, chat.learns) if message["role"] == "assistant"]
        if len(encoded.spans) != len(answers):
            found = f"{len(encoded.spans)} answers found in {len(answers)} assistant messages"
            raise Refusal(found, "one in each", "put {% generation %} round every answer in the chat template")
        spans = [span for span, learnt in zip(encoded.spans, answers) if learnt and span[0] < span[1]]
        if not spans:
            raise Refusal("an answer without a token", "one to learn", "leave the row out")
    ids, learnt = np.array(encoded.ids[: spans[-1][1]], np.int32), np.zeros(spans[-1][1], bool)
    for start, stop in spans:
        learnt[start:stop] = True
    return (ids, learnt) if chat.cut is None else cut_off(ids, learnt, spans, chat.cut, tokenizer)


def cut_off(
    ids: np.ndarray, learnt: np.ndarray, spans: Sequence[tuple[int, int]], share: float, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """The last thought cut after `share` of its tokens and closed there, the answer as it was.

    The closing token is not learnt, so that nothing teaches the model to stop thinking early (Nemotron 3 Ultra).
    """
    opening, closing = tokenizer.id_of(THINK_OPEN), tokenizer.id_of(THINK_CLOSE)
    for start, stop in reversed(spans):
        closes = np.flatnonzero(ids[start:stop] == closing)
        if len(closes) and closes[0] > 0:
            end = start + int(closes[0])
            opens = np.flatnonzero(ids[start:end] == opening)  # where the model opens the thought, not the prompt
            first = start + int(opens[0]) + 1 if len(opens) else start
            kept = np.ones(len(ids), bool)
            kept[first + int(share * (end - first)) : end] = False
            learnt = learnt.copy()
            learnt[end] = False
            return ids[kept], learnt[kept]
    return ids, learnt


@dataclass(frozen=True)
class Controls:
    """Shares of the conversations with a thought: those learnt without it, and those with it cut at a random place."""

    reasoning_off: float = 0.0
    truncated_thoughts: float = 0.0

    def applied(self, chats: Sequence[Chat], seed: int) -> list[Chat]:
        """The conversations, some of them changed; which ones depends on the seed and their number alone."""
        found, thoughtful = list(chats), [number for number, chat in enumerate(chats) if chat.thinks]
        asked = {"reasoning_off": self.reasoning_off, "truncated_thoughts": self.truncated_thoughts}
        for name, share in asked.items():
            if share and not thoughtful:
                raise Refusal(f"data.{name} = {share}, and no answer has a thought", "0", f"set data.{name} = 0")
            if share and not round(share * len(thoughtful)):
                few = f"data.{name} = {share} of {len(thoughtful)} conversations with a thought, which makes none"
                allowed = f"0, or enough for one: {1 / len(thoughtful):.3g}"
                raise Refusal(few, allowed, f"raise data.{name}, give more conversations, or leave it out")
        random = np.random.default_rng([seed, 1])
        order = random.permutation(thoughtful)
        off, cut = (round(share * len(order)) for share in asked.values())
        for number in order[:off]:
            found[number] = found[number].without_thoughts()
        for number in order[off : off + cut]:
            found[number] = replace(found[number], cut=float(random.random()))
        return found


def split(chats: Sequence[Chat], held_out: float) -> tuple[list[Chat], list[Chat]]:
    """(to learn from, held out): about `held_out` of the conversations, at least one, chosen by what they say.

    Equal conversations stay together, and new ones move none of the old ones, unless there are very few.
    """
    if not held_out:
        return list(chats), []
    places = {chat.digest: int(chat.digest[:12], 16) / 16**12 for chat in chats}
    if len(places) < 2:
        found = "one conversation, and nothing to hold out"
        raise Refusal(found, "two different ones", "give more, or set data.held_out = 0")
    away = {digest for digest, place in places.items() if place < held_out} or {min(places, key=places.__getitem__)}
    if len(away) == len(places):
        away.remove(max(away, key=places.__getitem__))
    return [chat for chat in chats if chat.digest not in away], [chat for chat in chats if chat.digest in away]


def dedicated(chats: Sequence[Chat], unfold: bool) -> Iterator[Chat]:
    """The conversations, unfolded where that is asked for."""
    for chat in chats:
        yield from chat.unfolded() if unfold else [chat]
