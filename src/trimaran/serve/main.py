"""`trimaran serve`: a model on a port, until it is told to stop, and then until its answers are finished."""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from trimaran import config
from trimaran.engine.engine import Engine
from trimaran.engine.folder import FolderSettings, open_draft, open_folder
from trimaran.engine.runner import Runner
from trimaran.errors import Refusal
from trimaran.report.terminal import put
from trimaran.serve.app import application
from trimaran.serve.service import Service
from trimaran.serve.settings import KEY, ServerSettings, ServeSettings

FLUSH_SECONDS = 5  # for the last bytes of finished answers to reach their clients


def main(target: str, overrides: Sequence[str] = ()) -> None:
    """Serves the model of a folder until SIGTERM or Ctrl-C; what is running then is finished, what is new refused."""
    settings = config.load(ServerSettings, None, overrides)
    with listening(settings.serve) as door:
        service = service_of(target, settings)
        for line in told(service, settings):
            put(sys.stderr, line + "\n")
        door.listen()
        put(sys.stdout, f"serving {service.names[0]} at {address(door)}\n")
        try:
            Server(service).run([door])
        finally:
            service.runner.close()


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process. url: where it listens, such as http://127.0.0.1:8000."""

    url: str
    service: Service


@contextlib.contextmanager
def running(target: str | Path, overrides: Sequence[str] = ("serve.port=0",)) -> Iterator[Running]:
    """`trimaran serve` for the length of a with block, for notebooks and tests."""
    settings = config.load(ServerSettings, None, overrides)
    with listening(settings.serve) as door:
        service = service_of(str(target), settings)
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([door],), name="trimaran-serve", daemon=True)
        door.listen()
        thread.start()
        try:
            yield Running(address(door), service)
        finally:
            server.leaving = True
            thread.join()
            service.runner.close()


def service_of(target: str, settings: ServerSettings) -> Service:
    """Opens the folder and starts its engine."""
    placement = FolderSettings(device=settings.device, dtype=settings.dtype, ops=settings.ops)
    folder = open_folder(target, placement)
    draft = None if settings.draft_model is None else open_draft(settings.draft_model, placement, folder)
    engine = Engine(folder.model, folder.tokenizer, settings.engine, draft_model=None if draft is None else draft.model)
    names = settings.serve.names or (Path(target).resolve().name,)
    return Service(folder, Runner(engine, queue_limit=settings.serve.queue), settings.serve, names)


def told(service: Service, settings: ServerSettings) -> Iterator[str]:
    """What whoever starts a server should know: how its memory is laid out, and what may surprise."""
    engine = service.runner.engine
    yield from engine.memory.arithmetic()
    for warning in engine.warnings:
        yield f"warning: {warning}"
    if service.folder.base:
        yield f"warning: a base model ({service.folder.base}): it goes on from the text of a conversation"
    if service.settings.key() is None and not service.settings.local:
        yield f"warning: anyone who reaches {settings.serve.host} may use this model; set serve.api_key or {KEY}"


@contextlib.contextmanager
def listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """A socket bound to the address, before a model is read for nothing. Nobody is let in yet."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place = f"serve.host = {settings.host!r}, serve.port = {settings.port}"
        try:
            door.bind((settings.host, settings.port))
        except socket.gaierror:
            raise Refusal(place, "an address of this machine", "try serve.host=127.0.0.1") from None
        except OSError as problem:
            reasons = {
                errno.EADDRINUSE: ("a port that nobody listens on", "serve.port=0 takes any that is free"),
                errno.EACCES: ("a port that you may open", "choose one of 1024 or more"),
                errno.EADDRNOTAVAIL: ("an address of this machine", "try serve.host=127.0.0.1"),
            }
            if problem.errno not in reasons:
                raise
            raise Refusal(place, *reasons[problem.errno]) from None
        yield door


def address(door: socket.socket) -> str:
    host, port = door.getsockname()[:2]
    return f"http://[{host}]:{port}" if door.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, but that a signal first lets the engine finish: until then clients and probes are answered 503.

    leaving: set to stop. A second signal stops at once.
    """

    def __init__(self, service: Service):
        super().__init__(
            uvicorn.Config(
                application(service),
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self.service, self.leaving = service, False
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second stops. Ctrl-C is told to the command line at the end."""
        if sig == signal.SIGINT and sig not in self._captured_signals:
            self._captured_signals.append(sig)
        if self.leaving:
            self.should_exit = self.force_exit = True
        self.leaving = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self.leaving and self.draining is None:
            self.draining = asyncio.create_task(self.drain())
        return await super().on_tick(counter)

    async def drain(self) -> None:
        """Waits for what is running, then lets uvicorn shut down."""
        await self.service.runner.drain(self.service.settings.drain_seconds)
        self.should_exit = True
