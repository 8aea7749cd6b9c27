"""A server that says what a test tells it to, when it tells it to, in the protocol of `trimaran serve`.

The chat page is driven against it where a test must know every word, or must stand still in the middle of an answer.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

import trimaran.serve
from trimaran.serve.guard import HEADERS

STATIC = Path(trimaran.serve.__file__).parent / "static"


class Gate:
    """A stream waits here until the test opens it."""

    def __init__(self) -> None:
        self.open = threading.Event()


@dataclass(frozen=True)
class Think:
    text: str


@dataclass(frozen=True)
class Say:
    text: str


class Break:
    """The connection breaks in the middle of the answer."""


@dataclass
class Script:
    """What happens next. answers: pieces of the next answers, in order; the last answer is given again and again."""

    answers: list[list[Think | Say | Gate | Break]] = field(default_factory=lambda: [[Say("Aye.")]])
    refusal: tuple[int, str, dict[str, str]] | None = None  # status, message, headers of the next answer instead
    key: str | None = None
    base: str | None = None
    finish: str = "stop"
    drafted: tuple[int, int, int] = (0, 0, 0)  # drafted, accepted, passes
    cached: int = 0
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (path, body) of what was asked
    left: int = 0  # clients that went away before the end

    @property
    def body(self) -> dict[str, Any]:
        """What was asked last."""
        return self.requests[-1][1]


@dataclass
class Stage:
    """What is played now."""

    script: Script = field(default_factory=Script)


def application(stage: Stage) -> FastAPI:
    """The server. The script may be changed, and exchanged, while it runs."""
    app = FastAPI()

    @app.middleware("http")
    async def manners(request: Request, call_next: Any) -> Any:
        script = stage.script
        if script.key and request.url.path.startswith("/v1") and bearer(request) != script.key:
            response = refused(401, "wrong or no key", {})
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": "harbour/hybrid-nano", "object": "model", "max_model_len": 4096, "base": stage.script.base}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        script, body = stage.script, await request.json()
        script.requests.append((request.url.path, body))
        if script.refusal:
            status, message, headers = script.refusal
            script.refusal = None
            return refused(status, message, headers)
        pieces = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
        chat = request.url.path.endswith("/chat/completions")
        return StreamingResponse(stream(script, pieces, chat), media_type="text/event-stream")

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


def bearer(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def refused(status: int, message: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


async def stream(script: Script, pieces: list[Any], chat: bool) -> AsyncIterator[bytes]:
    tokens = thoughts = 0
    if chat:
        yield event(choice({"delta": {"role": "assistant", "content": ""}}), usage(script, 0, 0))
    try:
        for piece in pieces:
            if isinstance(piece, Gate):
                while not piece.open.is_set():
                    await asyncio.sleep(0.005)
                continue
            if isinstance(piece, Break):
                raise ConnectionAbortedError("as the script says")
            for word in words(piece.text):
                tokens += 1
                thoughts += isinstance(piece, Think)
                delta = (
                    {"reasoning": word, "reasoning_content": word} if isinstance(piece, Think) else {"content": word}
                )
                yield event(choice({"delta": delta} if chat else {"text": word}), usage(script, tokens, thoughts))
    except (asyncio.CancelledError, GeneratorExit):
        script.left += 1
        raise
    last = {"delta": {}} if chat else {"text": ""}
    yield event(choice(last, script.finish), usage(script, tokens, thoughts))
    yield event([], usage(script, tokens, thoughts))
    yield b"data: [DONE]\n\n"


def words(text: str) -> Iterator[str]:
    """Pieces of three characters: no border of a word, a tag or a mark is safe from them."""
    return (text[at : at + 3] for at in range(0, len(text), 3))


def choice(what: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "finish_reason": finish, **what}]


def usage(script: Script, tokens: int, thoughts: int) -> dict[str, Any]:
    drafted, accepted, passes = script.drafted
    work = {"drafted": drafted, "accepted": accepted, "passes": passes, "cached_tokens": script.cached}
    return {
        "prompt_tokens": 412,
        "completion_tokens": tokens,
        "total_tokens": 412 + tokens,
        "prompt_tokens_details": {"cached_tokens": script.cached},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
        "x_trimaran": {**work, "tokens_per_second": 61.25 if tokens else None},
    }


def event(choices: list[dict[str, Any]], used: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'object': 'chunk', 'choices': choices, 'usage': used})}\n\n".encode()


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """The port of `app` on this machine, while the block lasts."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)
