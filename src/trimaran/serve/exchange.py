"""One request and its answer: the engine's pieces become a whole reply, or the replies of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from trimaran.engine.request import Piece, Request
from trimaran.engine.runner import Busy
from trimaran.errors import Refusal
from trimaran.serve.answers import ChatChoice, TextChoice, usage_of
from trimaran.serve.problem import refused
from trimaran.serve.replies import ChatChunk, ChatCompletion, ChunkChoice, Completion, Message, Reply, Usage
from trimaran.serve.requests import Generation, StreamOptions
from trimaran.serve.service import Service
from trimaran.serve.stream import merged, turned_away
from trimaran.serve.translate import ChatAsk, CompletionAsk

Choice = TypeVar("Choice", ChatChoice, TextChoice)


class Exchange(Generic[Choice]):
    """What both kinds of request share. `choices`: all samples of the first request, then those of the next.

    Making one hands its requests to the engine; what can not be taken is a `Problem` at once.
    """

    def __init__(
        self, service: Service, body: Generation, prefix: str, requests: Sequence[Request], choices: list[Choice]
    ):
        self.service, self.requests = service, requests
        self.choices: list[Choice] = choices
        self.name = service.check_model(body.model)
        self.id = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
        self.options = body.stream_options or StreamOptions()
        self.created, self.began = int(time.time()), time.perf_counter()
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.streams = opened_streams(service, requests)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """(the choice that grows, its piece), as they come. Closing this aborts the requests."""
        samples = self.requests[0].sampling.samples
        async with aclosing(merged(self.streams)) as grown:
            async for number, piece in grown:
                yield self.choices[number * samples + piece.sample], piece

    def seen(self, choice: Choice, piece: Piece) -> None:
        """Tells the metrics of a piece that `choice` has taken in."""
        metrics, count = self.service.metrics, choice.count
        if count.first is not None and count.tokens == len(piece.tokens):
            metrics.first_token.add(count.first - self.began)
        if count.output is not None:
            metrics.end(choice.finish_reason)
            metrics.reasoning_tokens += count.reasoning_tokens
            metrics.whole.add(count.last - self.began)
            if count.seconds_per_token is not None:
                metrics.between_tokens.add(count.seconds_per_token)

    def broken_off(self, reason: str) -> None:
        """Tells the metrics why the texts that have not ended never will."""
        for choice in self.choices:
            if choice.count.output is None:
                self.service.metrics.end(reason)

    def usage(self) -> Usage:
        return usage_of(self.prompt_tokens, [choice.count for choice in self.choices])

    def running_usage(self) -> dict[str, Any]:
        """The usage so far, as the field of a chunk that asks for it."""
        return {"usage": self.usage()} if self.options.continuous_usage_stats else {}

    @property
    def head(self) -> dict[str, Any]:
        """What every reply begins with."""
        return {"id": self.id, "created": self.created, "model": self.name}


class ChatExchange(Exchange[ChatChoice]):
    """An answer to a conversation."""

    def __init__(self, service: Service, body: Generation, ask: ChatAsk):
        choices = [ChatChoice(index, ask, service.tokenizer) for index in range(ask.request.sampling.samples)]
        super().__init__(service, body, "chatcmpl", [ask.request], choices)

    async def whole(self) -> ChatCompletion:
        """The answer, once it is complete."""
        async with aclosing(self.pieces()) as pieces:
            async for choice, piece in pieces:
                choice.push(piece)
                self.seen(choice, piece)
        choices = [choice.whole() for choice in self.choices]
        return ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self.usage())

    async def stream(self) -> AsyncGenerator[Reply, None]:
        """The answer as it grows."""
        for choice in self.choices:
            opening = Message(role="assistant", content="")
            yield self.chunk([ChunkChoice(index=choice.index, delta=opening, finish_reason=None)])
        async with aclosing(self.pieces()) as pieces:
            async for choice, piece in pieces:
                chunks = choice.chunks(piece)
                self.seen(choice, piece)
                for chunk in chunks:
                    yield self.chunk([chunk])
        if self.options.include_usage:
            yield ChatChunk(**self.head, object="chat.completion.chunk", choices=[], usage=self.usage())

    def chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=choices, **self.running_usage())


class CompletionExchange(Exchange[TextChoice]):
    """Continuations of prompts."""

    def __init__(self, service: Service, body: Generation, ask: CompletionAsk):
        samples = ask.requests[0].sampling.samples
        choices = [  # in the order of prompts, each one's samples together
            TextChoice(index, service.tokenizer, ask.stop_ids, echo=ask.echoes[index // samples])
            for index in range(samples * len(ask.requests))
        ]
        super().__init__(service, body, "cmpl", ask.requests, choices)

    async def whole(self) -> Completion:
        """The continuations, once they are complete."""
        async with aclosing(self.pieces()) as pieces:
            async for choice, piece in pieces:
                choice.push(piece)
                self.seen(choice, piece)
        choices = [choice.whole() for choice in self.choices]
        return Completion(**self.head, object="text_completion", choices=choices, usage=self.usage())

    async def stream(self) -> AsyncGenerator[Reply, None]:
        """The continuations as they grow."""
        async with aclosing(self.pieces()) as pieces:
            async for choice, piece in pieces:
                grown = choice.push(piece)
                self.seen(choice, piece)
                yield Completion(**self.head, object="text_completion", choices=[grown], **self.running_usage())
        if self.options.include_usage:
            yield Completion(**self.head, object="text_completion", choices=[], usage=self.usage())


def opened_streams(service: Service, requests: Sequence[Request]) -> list[AsyncIterator[Piece]]:
    """A stream for each request; a problem at once for what can never be honoured, or not now."""
    try:
        return [service.runner.stream(request) for request in requests]
    except Refusal as problem:
        longest = max(len(request.prompt) + request.sampling.max_tokens for request in requests)
        too_long = service.longest is not None and longest > service.longest
        raise refused(problem, code="context_length_exceeded" if too_long else None) from None
    except Busy as busy:
        raise turned_away(busy) from None
