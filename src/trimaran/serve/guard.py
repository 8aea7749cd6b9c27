"""What every request passes before a route sees it: the host, the key, the size of its body, its JSON's manners."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from trimaran.serve import body
from trimaran.serve.hosts import Hosts
from trimaran.serve.problem import Problem
from trimaran.serve.settings import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")  # the page is a shell that asks for the key itself
OPEN_BELOW = "/static/"
PATIENCE = 64 * 2**20  # bytes of a body that is too long before the connection is cut
CLOSE = {"connection": "close"}
HEADERS = {
    "cache-control": "no-cache",  # or a browser mixes the page's files of two versions
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}


class Guard:
    """An ASGI application round another. hosts: None: of any name. answered: told route and status of every answer."""

    def __init__(
        self,
        app: Application,
        key: str | None,
        limits: Limits,
        answered: Callable[[str, int], None],
        hosts: Hosts | None = None,
    ):
        self.inner, self.limits, self.answered, self.hosts = app, limits, answered, hosts
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return

        async def polite(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(route_of(scope), message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        try:
            if self.hosts is not None:
                self.hosts.check(headers)
            self.check_key(scope["path"], headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                raw = await self.whole_body(headers, receive)
                if raw is None:  # the client left while it was speaking
                    return
                self.check_body(raw, headers)
                receive = again(raw, receive)
        except Problem as problem:
            await problem.response()(scope, receive, polite)
            return
        await self.inner(scope, receive, polite)

    def check_key(self, path: str, headers: Headers) -> None:
        """Refuses with 401 whoever does not hold the key. The comparison takes as long for every wrong one."""
        if self.key is None or path in OPEN or path.startswith(OPEN_BELOW):
            return
        if not any(hmac.compare_digest(given, self.key) for given in keys(headers)):
            wanted = "the API key, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`"
            raise Problem(401, f"wrong or no key; give {wanted}", code="invalid_api_key", headers=CHALLENGE)

    async def whole_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, or None when the client leaves before its end; 413 for one that is too long.

        The rest of that is read and forgotten, within reason: a client that is cut off while it sends never gets to
        read why.
        """
        most, parts, size = self.limits.body_bytes, [], 0
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said) > PATIENCE:
            raise too_long(most)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size > PATIENCE:
                        raise too_long(most)
                    if size <= most:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            message_text = f"no whole body within {self.limits.body_seconds:g} seconds"
            raise Problem(408, message_text, headers=CLOSE) from None
        if size > most:
            raise too_long(most)
        return b"".join(parts)

    def check_body(self, raw: bytes, headers: Headers) -> None:
        """Refuses a body that is no JSON, or says to be something else."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another origin may post plain text without asking the browser for leave, but not JSON.
            raise Problem(415, f"content-type {kind or 'missing'}; allowed: application/json")
        body.read(raw, self.limits.json_depth)


def route_of(scope: MutableMapping[str, Any]) -> str:
    """The path that the route was declared with; what strangers make up is not told apart."""
    return str(getattr(scope.get("route"), "path", "other"))


CHALLENGE = {"www-authenticate": "Bearer"}


def keys(headers: Headers) -> Iterable[bytes]:
    """The keys that a request shows, as the bytes that came."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield bearer.strip().encode("latin-1")
    yield headers.get("x-api-key", "").encode("latin-1")


def too_long(most: int) -> Problem:
    return Problem(413, f"the body is longer than {most} bytes", code="body_too_large", headers=CLOSE)


def again(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what comes after it: the news that the client left."""
    waiting = [{"type": "http.request", "body": raw, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
