"""An engine in a thread of its own, for asyncio: requests go in, streams of pieces come out.

Only that thread touches the engine. Callers leave orders in an inbox; after each pass the pieces go to their event
loops, one wake-up per loop however many streams grew. A stream that is closed or cancelled aborts its request.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimaran.engine.request import Piece, Request
from trimaran.engine.row import Output

if TYPE_CHECKING:
    from trimaran.engine.engine import Engine

IDLE_TURN = 0.25  # seconds between two beats of an idle engine's heart


class Busy(RuntimeError):
    """The queue is full, or the runner takes no more requests. `closing`: it will not take any later either."""

    def __init__(self, message: str, closing: bool = False):
        self.closing = closing
        super().__init__(message)


@dataclass
class Channel:
    """Where the pieces of one request go: a queue in the loop of whoever asked."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Piece | BaseException]" = field(default_factory=asyncio.Queue)
    samples: int = 0  # that have ended


class Runner:
    """Runs `engine` until `close`.

    queue_limit: requests that may wait for a place; one more is `Busy`. heartbeat: monotonic time of the last finished
    pass or idle turn. broken: what ended the thread when its memory could not be trusted any more.
    """

    def __init__(self, engine: "Engine", queue_limit: int = 256):
        self.engine, self.queue_limit = engine, queue_limit
        self.heartbeat = time.monotonic()
        self.broken: BaseException | None = None
        self.draining = self.closing = False
        self.open: dict[str, Channel] = {}
        self.inbox: list[Channel | str] = []  # a request to submit, or the id of one to abort
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="trimaran-engine", daemon=True)
        self.thread.start()

    # for callers, in any event loop

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """The request's pieces as they come. Raises at once `Refusal` for what can never be honoured, and `Busy`.

        Closing or cancelling the iterator aborts the request and gives back all that it held.
        """
        self.engine.check(request)
        self.admit(request)
        return self._stream(request)

    async def _stream(self, request: Request) -> AsyncIterator[Piece]:
        self.admit(request)
        channel = Channel(request, asyncio.get_running_loop())
        with self.wake:
            self.open[request.id] = channel
            self._order(channel)
        try:
            while channel.samples < request.sampling.samples:
                piece = await channel.queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece.error is not None:
                    raise piece.error
                channel.samples += piece.output is not None
                yield piece
        finally:
            with self.wake:
                if self.open.pop(request.id, None) is not None and channel.samples < request.sampling.samples:
                    self._order(request.id)

    async def generate(self, request: Request) -> list[Output]:
        """The request's outputs, in the order of samples."""
        outputs = [piece.output async for piece in self.stream(request) if piece.output is not None]
        return sorted(outputs, key=lambda output: output.sample)

    def admit(self, request: Request) -> None:
        """Raises `Busy` when the request cannot be taken now."""
        if self.broken is not None or not self.thread.is_alive():
            raise Busy(f"the engine has stopped: {self.broken!r}", closing=True)
        if self.draining or self.closing:
            raise Busy("the engine is shutting down", closing=True)
        if self.waiting >= self.queue_limit:
            raise Busy(f"{self.waiting} requests wait already, and {self.queue_limit} may")
        if request.id in self.open:
            raise Busy(f"a request with the id {request.id!r} is running")

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return self.engine.waiting_requests + len(self.inbox)

    def stalled(self, seconds: float) -> bool:
        """Whether the engine's thread has ended, or has finished no pass for so long."""
        return not self.thread.is_alive() or time.monotonic() - self.heartbeat > seconds

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits for what runs; True when all of it ended in time. The rest is aborted."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self.open and time.monotonic() < deadline and self.thread.is_alive():
            await asyncio.sleep(0.02)
        finished = not self.open
        self._fail_all(Busy("the engine is shutting down", closing=True))
        return finished

    def close(self) -> None:
        """Ends the thread; whatever still runs is aborted."""
        with self.wake:
            self.closing = True
            self.wake.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # in the engine's thread

    def _work(self) -> None:
        try:
            while not self.closing:
                orders = self._orders()
                self._obey(orders)
                if not self.engine.idle and not self.closing:
                    self._pass()
                self.heartbeat = time.monotonic()
        finally:  # whatever ends the thread, nobody waits for it for ever
            ended = "the engine has been closed" if self.closing else "the engine's thread has died"
            self._fail_all(self.broken or Busy(ended, closing=True))
        self._obey(self._orders(wait=False))

    def _orders(self, wait: bool = True) -> list[Channel | str]:
        with self.wake:
            if wait and not self.inbox and self.engine.idle and not self.closing:
                self.wake.wait(IDLE_TURN)
            orders, self.inbox = self.inbox, []
        return orders

    def _obey(self, orders: list[Channel | str]) -> None:
        for order in orders:
            if isinstance(order, str):
                self.engine.abort(order)
            elif self.closing or order.request.id not in self.open:
                continue
            else:
                try:
                    self.engine.submit(order.request)
                except ValueError as problem:  # a Refusal that only shows in the engine's own thread
                    self._send([(order, problem)])

    def _pass(self) -> None:
        """One pass. What goes wrong in it fails the requests that were in it, and nobody else."""
        try:
            pieces = self.engine.step()
        except Exception as problem:
            failed = self.engine.recover()
            self._send([(channel, problem) for one in failed if (channel := self.open.get(one))])
            if self.engine.faults():
                self.broken, self.closing = problem, True
            return
        self._send([(channel, piece) for piece in pieces if (channel := self.open.get(piece.request))])

    def _send(self, parcels: "list[tuple[Channel, Piece | BaseException]]") -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Channel, Piece | BaseException]]] = {}
        for channel, parcel in parcels:
            by_loop.setdefault(channel.loop, []).append((channel, parcel))
        for loop, own in by_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, own)
            except RuntimeError:  # that loop is closed, and with it everyone who listened there
                for channel, _ in own:
                    self.open.pop(channel.request.id, None)
                    self.engine.abort(channel.request.id)

    def _fail_all(self, problem: BaseException) -> None:
        with self.wake:
            channels = list(self.open.values())
        for channel in channels:
            self._send([(channel, problem)])

    def _order(self, order: Channel | str) -> None:
        self.inbox.append(order)
        self.wake.notify()


def put_all(parcels: "list[tuple[Channel, Piece | BaseException]]") -> None:
    for channel, parcel in parcels:
        channel.queue.put_nowait(parcel)
