"""Answers while they grow: pieces of the engine in, what clients are told out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from trimaran.engine.request import Piece
from trimaran.engine.row import Output
from trimaran.serve import replies
from trimaran.serve.replies import (
    ChatLogprobs,
    ChunkChoice,
    CompletionChoice,
    CompletionLogprobs,
    Finish,
    Message,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from trimaran.serve.translate import ChatAsk
from trimaran.text.answer import AnswerReader, ContentText, Delta, ReasoningText
from trimaran.text.call import CallStart
from trimaran.text.thought import ThoughtCounter
from trimaran.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no minus infinity


@dataclass
class Count:
    """Tokens and times of one sample."""

    tokens: int = 0
    reasoning_tokens: int = 0
    output: Output | None = None
    first: float | None = None  # when its first token came, and how many came with it
    with_first: int = 0
    last: float = 0.0

    def add(self, piece: Piece) -> None:
        self.last = time.perf_counter()
        self.tokens += len(piece.tokens)
        self.output = piece.output or self.output
        if self.first is None and piece.tokens:
            self.first, self.with_first = self.last, len(piece.tokens)

    @property
    def seconds_per_token(self) -> float | None:
        """The mean time between tokens after the first; None where there were none."""
        later = self.tokens - self.with_first
        return (self.last - self.first) / later if self.first is not None and later and self.last > self.first else None


class ChatChoice:
    """One answer to a conversation."""

    def __init__(self, index: int, ask: ChatAsk, tokenizer: Tokenizer):
        self.index, self.ask, self.tokenizer = index, ask, tokenizer
        self.reader = AnswerReader(ask.opened, ask.tools, force_nonempty_content=ask.swap)
        self.thought = ThoughtCounter(tokenizer, ask.opened)
        self.count = Count()
        self.logprobs: list[TokenLogprob] = []

    def push(self, piece: Piece) -> list[Message]:
        """What the piece adds to the answer, as deltas of a stream."""
        self.count.add(piece)
        for token in piece.tokens:
            self.count.reasoning_tokens = self.thought.push(token)
        deltas = self.reader.push(piece.text) + ([] if piece.output is None else self.reader.finish())
        if piece.logprobs is not None:
            self.logprobs += chat_logprobs(piece, self.tokenizer)
        return [message for message in map(self.message, deltas) if message is not None]

    def message(self, delta: Delta) -> Message | None:
        """A delta in OpenAI's form; None for what is not handed out."""
        if isinstance(delta, ReasoningText):
            return Message(reasoning=delta.text, reasoning_content=delta.text) if self.ask.shown else None
        if isinstance(delta, ContentText):
            return Message(content=delta.text)
        if self.ask.one_call and delta.index:
            return None
        if isinstance(delta, CallStart):
            function = replies.CalledFunction(name=delta.name, arguments="")
            call = replies.ToolCall(index=delta.index, id=delta.id, type="function", function=function)
        else:
            call = replies.ToolCall(index=delta.index, function=replies.CalledFunction(arguments=delta.text))
        return Message(tool_calls=[call])

    def chunks(self, piece: Piece) -> list[ChunkChoice]:
        """What a stream tells of the piece. Log-probabilities go with the first chunk; the last says why it ended."""
        before = len(self.logprobs)
        deltas = self.push(piece)
        new = self.logprobs[before:]
        if new and not deltas:
            deltas = [Message()]
        chunks = [ChunkChoice(index=self.index, delta=delta, finish_reason=None) for delta in deltas]
        if new:
            chunks[0].logprobs = ChatLogprobs(content=new)
        if piece.output is not None:
            finish, stop = self.finish_reason, stop_reason(piece.output, self.ask.stop_ids)
            chunks.append(ChunkChoice(index=self.index, delta=Message(), finish_reason=finish, stop_reason=stop))
        return chunks

    @property
    def finish_reason(self) -> Finish:
        """Why it ended, which it must have."""
        assert self.count.output is not None
        if self.count.output.finish == "length":
            return "length"
        return "tool_calls" if self.reader.answer.calls else "stop"

    def whole(self) -> replies.ChatChoice:
        """The finished answer."""
        answer, output = self.reader.answer, self.count.output
        assert output is not None
        message = Message(role="assistant", content=answer.content or (None if answer.calls else ""))
        if self.ask.shown and answer.reasoning:
            message.reasoning = message.reasoning_content = answer.reasoning
        if answer.calls:
            message.tool_calls = [
                replies.ToolCall(
                    id=call.id,
                    type="function",
                    function=replies.CalledFunction(name=call.name, arguments=call.arguments),
                )
                for call in answer.calls[: 1 if self.ask.one_call else None]
            ]
        return replies.ChatChoice(
            index=self.index,
            message=message,
            logprobs=None if output.logprobs is None else ChatLogprobs(content=self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=stop_reason(output, self.ask.stop_ids),
        )


class TextChoice:
    """One continuation of a prompt. echo: the prompt's text where it is to be repeated, else ""."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop_ids: Sequence[int], echo: str = ""):
        self.index, self.tokenizer, self.stop_ids = index, tokenizer, stop_ids
        self.text, self.echo = "", echo
        self.count = Count()
        self.logprobs: CompletionLogprobs | None = None

    def push(self, piece: Piece) -> CompletionChoice:
        """What the piece adds, as a choice of a stream's event."""
        self.count.add(piece)
        new = None
        if piece.logprobs is not None:
            new = completion_logprobs(piece, self.tokenizer, len(self.text))
            self.logprobs = new if self.logprobs is None else joined(self.logprobs, new)
        text = piece.text if self.text else self.echo + piece.text
        self.echo, self.text = "" if text else self.echo, self.text + text
        return self.choice(text, new)

    def whole(self) -> CompletionChoice:
        """The finished continuation."""
        return self.choice(self.text, self.logprobs)

    @property
    def finish_reason(self) -> Finish:
        """Why it ended, which it must have."""
        assert self.count.output is not None
        return "length" if self.count.output.finish == "length" else "stop"

    def choice(self, text: str, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        output = self.count.output
        return CompletionChoice(
            index=self.index,
            text=text,
            logprobs=logprobs,
            finish_reason=None if output is None else self.finish_reason,
            stop_reason=None if output is None else stop_reason(output, self.stop_ids),
        )


def stop_reason(output: Output, stop_ids: Sequence[int]) -> int | str | None:
    """The stop string, or the stop token of the request's own, that ended an output."""
    return output.stop if isinstance(output.stop, str) or output.stop in stop_ids else None


def usage_of(prompt_tokens: int, counts: Sequence[Count]) -> Usage:
    """Usage of all choices so far; drafts and passes of those that have ended."""
    made = sum(count.tokens for count in counts)
    outputs = [count.output for count in counts if count.output is not None]
    cached = sum(output.cached for output in outputs)
    began = [count.first for count in counts if count.first is not None]
    seconds = max((count.last for count in counts), default=0.0) - min(began, default=0.0)
    later = made - sum(count.with_first for count in counts)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=made,
        total_tokens=prompt_tokens + made,
        prompt_tokens_details=replies.PromptDetails(cached_tokens=cached),
        completion_tokens_details=replies.CompletionDetails(
            reasoning_tokens=sum(count.reasoning_tokens for count in counts)
        ),
        x_trimaran=replies.Work(
            drafted=sum(output.drafted for output in outputs),
            accepted=sum(output.accepted for output in outputs),
            passes=sum(output.passes for output in outputs),
            cached_tokens=cached,
            tokens_per_second=round(later / seconds, 3) if later and seconds > 0 else None,
        ),
    )


def bounded(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def spelt(token: int, tokenizer: Tokenizer) -> str:
    """A token's text; bytes that are no character by themselves become U+FFFD."""
    return tokenizer.token_bytes[token].decode("utf-8", "replace")


def top_logprob(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = list(tokenizer.token_bytes[token])
    return TopLogprob(token=spelt(token, tokenizer), logprob=bounded(logprob), bytes=raw)


def likeliest(piece: Piece, place: int, tokenizer: Tokenizer) -> list[TopLogprob]:
    """The likeliest tokens at a place, where they were asked for. A model often has more ids than its tokenizer can
    spell; those are never chosen, and not shown."""
    tops = [] if piece.top is None else piece.top[place]
    return [top_logprob(*one, tokenizer) for one in tops if one[0] < tokenizer.vocab_size]


def chat_logprobs(piece: Piece, tokenizer: Tokenizer) -> list[TokenLogprob]:
    """An entry for each token of a piece."""
    entries = []
    for place, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs or [], strict=True)):
        entry, tops = top_logprob(token, logprob, tokenizer), likeliest(piece, place, tokenizer)
        entries.append(TokenLogprob(token=entry.token, logprob=entry.logprob, bytes=entry.bytes, top_logprobs=tops))
    return entries


def completion_logprobs(piece: Piece, tokenizer: Tokenizer, offset: int) -> CompletionLogprobs:
    """The columns of a piece whose text begins after `offset` characters of the whole."""
    words = [spelt(token, tokenizer) for token in piece.tokens]
    places = [offset]
    for word in words[:-1]:
        places.append(places[-1] + len(word))
    columns = None
    if piece.top is not None:
        each = [likeliest(piece, place, tokenizer) for place in range(len(piece.tokens))]
        columns = [{one.token: one.logprob for one in tops} for tops in each]
    return CompletionLogprobs(
        tokens=words,
        token_logprobs=[bounded(logprob) for logprob in piece.logprobs or []],
        top_logprobs=columns,
        text_offset=places[: len(words)],
    )


def joined(before: CompletionLogprobs, new: CompletionLogprobs) -> CompletionLogprobs:
    """The columns of two stretches of text, one under the other."""
    tops = None if before.top_logprobs is None else [*before.top_logprobs, *(new.top_logprobs or [])]
    return CompletionLogprobs(
        tokens=[*before.tokens, *new.tokens],
        token_logprobs=[*before.token_logprobs, *new.token_logprobs],
        top_logprobs=tops,
        text_offset=[*before.text_offset, *new.text_offset],
    )
