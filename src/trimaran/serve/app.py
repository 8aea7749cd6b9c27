"""The routes: OpenAI's, vLLM's /tokenize and /detokenize, health, metrics, and the chat page."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from trimaran.engine.runner import Busy
from trimaran.errors import Refusal
from trimaran.serve import metrics, replies
from trimaran.serve.exchange import ChatExchange, CompletionExchange
from trimaran.serve.guard import Guard
from trimaran.serve.hosts import Hosts
from trimaran.serve.problem import Problem, invalid
from trimaran.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from trimaran.serve.service import Service
from trimaran.serve.stream import Events, Gone, events, problem_of, unless_gone
from trimaran.serve.translate import chat_ask, completion_ask, decoded, tokens_of

STATIC = Path(__file__).parent / "static"
LEFT = 499  # what proxies write down for a client that left; nobody reads it

ABOUT = "OpenAI's protocol over a Trimaran engine. Answers that are not 2xx hold OpenAI's error document."
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.Error, "description": words}
    for status, words in {
        400: "A request that can not be honoured",
        401: "Wrong or no key",
        404: "No such model, or no such route",
        405: "Not with this method",
        408: "Not finished in time",
        413: "A body too long",
        415: "A body that is not JSON",
        421: "Meant for another host",
        429: "The queue is full; see Retry-After",
        503: "Shutting down",
    }.items()
}
EVENT = {
    "type": "object",
    "description": "One event of many. `data` is a chunk in OpenAI's form, as JSON, and in the last event [DONE].",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
STREAMED = {"content": {"text/event-stream": {"schema": EVENT}}}


def application(service: Service) -> FastAPI:
    """The server as an ASGI application."""
    app = FastAPI(
        title="trimaran",
        description=ABOUT,
        docs_url=None,  # FastAPI's own pages fetch scripts from elsewhere
        redoc_url=None,
        responses=FAULTS,
        separate_input_output_schemas=False,
    )
    add_routes(app, Routes(service))
    app.add_exception_handler(Problem, answer_problem)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    settings = service.settings

    async def answer_known(request: Request, error: Exception) -> Response:
        return problem_of(error, settings.request_seconds).response()

    for known in (Refusal, Busy, TimeoutError):
        app.add_exception_handler(known, answer_known)
    app.add_exception_handler(Exception, answer_bug)  # tells the client nothing; the log gets the traceback
    hosts = Hosts.of(settings)
    app.add_middleware(Guard, key=settings.key(), limits=settings.limits, answered=service.answered, hosts=hosts)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def add_routes(app: FastAPI, routes: "Routes") -> None:
    """Declares every route, with what it answers."""

    def post(path: str, route: Callable[..., Any], model: type[replies.Reply], **more: Any) -> None:
        app.add_api_route(
            path, route, methods=["POST"], responses={200: {"model": model, **more}}, response_class=JSONResponse
        )

    def get(path: str, route: Callable[..., Any], **more: Any) -> None:
        app.add_api_route(path, route, methods=["GET"], **more)

    post("/v1/chat/completions", routes.chat, replies.ChatCompletion, **STREAMED)
    post("/v1/completions", routes.complete, replies.Completion, **STREAMED)
    for prefix in ("/v1", ""):
        post(f"{prefix}/tokenize", routes.tokenize, replies.Tokens)
        post(f"{prefix}/detokenize", routes.detokenize, replies.Prompt)
    get("/v1/models", routes.models, responses={200: {"model": replies.ModelList}})
    get("/v1/models/{name:path}", routes.model, responses={200: {"model": replies.ModelCard}})
    unhealthy = {"model": replies.Health, "description": "No longer, or not at all"}
    get("/health", routes.health, responses={200: {"model": replies.Health}, 503: unhealthy})
    get("/metrics", routes.metrics, response_class=PlainTextResponse)
    get("/", routes.page, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), name="static")


class Routes:
    """What the routes do."""

    def __init__(self, service: Service):
        self.service = service

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        self.service.check_model(body.model)
        # Writing prompts and compiling constraints may take a while; the event loop has streams to feed.
        ask = await run_in_threadpool(chat_ask, body, self.service)
        return await self.answer(ChatExchange(self.service, body, ask), bool(body.stream), request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        self.service.check_model(body.model)
        ask = await run_in_threadpool(completion_ask, body, self.service)
        return await self.answer(CompletionExchange(self.service, body, ask), bool(body.stream), request)

    async def answer(self, exchange: ChatExchange | CompletionExchange, stream: bool, request: Request) -> Response:
        """The exchange's reply, whole or as a stream; whoever leaves early has it aborted."""
        seconds = self.service.settings.request_seconds

        def failed(problem: Problem) -> None:
            exchange.broken_off("timeout" if problem.status == 408 else "error")

        if stream:
            told = events(exchange.stream(), seconds, failed)
            return Events(told, gone=lambda: exchange.broken_off("abort"))
        try:
            async with asyncio.timeout(seconds):
                reply = await unless_gone(request.receive, exchange.whole())
        except Gone:
            exchange.broken_off("abort")
            return Response(status_code=LEFT)
        except Exception as error:
            failed(problem_of(error, seconds))
            raise
        return JSONResponse(reply.document())

    async def models(self) -> Response:
        """The names that the model answers to."""
        return JSONResponse(replies.ModelList(object="list", data=[*map(self.card, self.service.names)]).document())

    async def model(self, name: str) -> Response:
        """One of them."""
        return JSONResponse(self.card(self.service.check_model(name)).document())

    def card(self, name: str) -> replies.ModelCard:
        service = self.service
        return replies.ModelCard(
            id=name,
            object="model",
            created=service.created,
            owned_by="trimaran",
            root=service.names[0],
            max_model_len=service.longest,
            base=service.folder.base,
        )

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation."""
        self.service.check_model(body.model)
        ids = await run_in_threadpool(tokens_of, body, self.service)
        reply = replies.Tokens(count=len(ids), max_model_len=self.service.longest, tokens=ids)
        if body.return_token_strs:
            pieces = self.service.tokenizer.token_bytes
            reply.token_strs = [pieces[one].decode("utf-8", "replace") for one in ids]
        return JSONResponse(reply.document())

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        self.service.check_model(body.model)
        text = await run_in_threadpool(decoded, body.tokens, self.service, "tokens")
        return JSONResponse(replies.Prompt(prompt=text).document())

    async def health(self) -> Response:
        """Whether the engine works: 503 while it shuts down, and when it has finished no pass for too long."""
        status = self.service.status
        return JSONResponse(replies.Health(status=status).document(), 200 if status == "ok" else 503)

    async def metrics(self) -> Response:
        """Counts and times for Prometheus."""
        text = self.service.metrics.text(self.service.runner.engine.stats())
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def page(self) -> Response:
        """The chat page."""
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


async def answer_problem(request: Request, problem: Exception) -> Response:
    """A problem that a route raised."""
    assert isinstance(problem, Problem)
    return problem.response()


async def answer_invalid(request: Request, problem: Exception) -> Response:
    """A body that is not of the form that its route takes."""
    assert isinstance(problem, RequestValidationError)
    return invalid(problem.errors()).response()


async def answer_http(request: Request, problem: Exception) -> Response:
    """An unknown route, or a method that it does not have."""
    assert isinstance(problem, HTTPException)
    place = f"{request.method} {request.url.path}"
    said = {404: f"no route {place}", 405: f"no {place}"}.get(problem.status_code, problem.detail)
    return Problem(problem.status_code, said, headers=problem.headers).response()


async def answer_bug(request: Request, problem: Exception) -> Response:
    """A bug of the server's own."""
    return problem_of(problem, 0).response()
