"""Answers over time: server-sent events, several streams at once, and clients that leave before the end."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from trimaran.engine.request import Piece
from trimaran.engine.runner import Busy
from trimaran.errors import Refusal
from trimaran.serve.problem import Problem, refused
from trimaran.serve.replies import Reply

DONE = b"data: [DONE]\n\n"
BREATH = 15.0  # seconds without an event after which a comment tells proxies that the stream lives
WAITING = b": waiting\n\n"

Item = TypeVar("Item")
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy is to hold events back


class Gone(Exception):
    """The client left before its answer was complete."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Carries out `work`; cancels it and raises `Gone` when the client leaves first. The body has been received."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """A stream of events that ends, and gives back what it held, as soon as its client leaves.

    Starlette watches for that only under some versions of the protocol between server and application.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], gone: Callable[[], None]):
        super().__init__(events, headers=HEADERS)
        self.events, self.gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            try:
                await unless_gone(receive, self.stream_response(send))
            except (Gone, OSError):  # sending to a client that has left is an OSError under newer protocols
                self.gone()


async def events(
    replies: AsyncGenerator[Reply, None], seconds: float, failed: Callable[[Problem], None]
) -> AsyncGenerator[bytes, None]:
    """The replies as server-sent events. What goes wrong on the way is told as a last event: the status has gone out.

    seconds: after which the rest is given up.
    """
    try:
        async with contextlib.aclosing(within(replies, seconds)) as timely:
            async for reply in timely:
                yield WAITING if reply is None else reply.event()
    except Exception as error:  # the boundary: whatever failed, the client is told, and the log has the rest
        problem = problem_of(error, seconds)
        failed(problem)
        if problem.status == 500:
            logging.getLogger("uvicorn.error").error("a stream failed", exc_info=error)
        yield b"data: " + problem.response().body + b"\n\n"
    yield DONE


async def within(replies: AsyncGenerator[Reply, None], seconds: float) -> AsyncGenerator[Reply | None, None]:
    """The replies, as long as they come before `seconds` have passed; then TimeoutError. None: still waiting."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    following = asyncio.ensure_future(following_of(replies))
    try:
        while True:
            await asyncio.wait({following}, timeout=min(BREATH, deadline - loop.time()))
            if following.done():
                if (reply := following.result()) is None:
                    return
                yield reply
                following = asyncio.ensure_future(following_of(replies))
            elif loop.time() < deadline:
                yield None
            else:
                raise TimeoutError
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await replies.aclose()


async def following_of(items: AsyncIterator[Item]) -> Item | None:
    """The next of what comes; None after the last."""
    return await anext(items, None)


def problem_of(error: Exception, seconds: float) -> Problem:
    """An error met while answering, as what the client is told: nothing about what is our own fault."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Refusal):
        return refused(error)
    if isinstance(error, Busy):
        return turned_away(error)
    if isinstance(error, TimeoutError):
        # 408 makes OpenAI's client try again, which would only take as long once more.
        message = f"not finished within {seconds:g} seconds"
        return Problem(408, message, code="timeout", headers={"x-should-retry": "false"})
    return Problem(500, "the server failed on this request; its log says why")


def turned_away(busy: Busy) -> Problem:
    """The answer to a request that cannot be taken now: 429 when it may come again soon, 503 when it may not."""
    if busy.closing:
        return Problem(503, str(busy), code="shutting_down", headers={"retry-after": "10"})
    return Problem(429, str(busy), code="queue_full", headers={"retry-after": "1"})


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(place of its stream, piece), as they come. Closing this closes every stream."""
    if len(streams) == 1:  # as nearly always, and then without a task for every piece
        try:
            async for only in streams[0]:
                yield 0, only
        finally:
            await closing(streams[0])
        return

    def following(number: int) -> asyncio.Task[Piece | None]:
        return asyncio.ensure_future(following_of(streams[number]))

    waiting = {following(number): number for number in range(len(streams))}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                number, piece = waiting.pop(task), task.result()
                if piece is not None:
                    waiting[following(number)] = number
                    yield number, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await closing(stream)


async def closing(stream: AsyncIterator[Piece]) -> None:
    """Closes a stream that can be closed."""
    close: Callable[[], Awaitable[None]] | None = getattr(stream, "aclose", None)
    if close is not None:
        await close()
