"""From what a client sent to what the engine takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimaran.engine.request import Request
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.serve.problem import Problem, refused
from trimaran.serve.reasoning import Reasoning, reasoning_of
from trimaran.serve.requests import ChatMessage, ChatRequest, CompletionRequest, Generation, NamedTool, TokenizeRequest
from trimaran.serve.rules import guide_of
from trimaran.serve.service import Service
from trimaran.serve.settings import Limits
from trimaran.text.chat import encode_chat
from trimaran.text.thought import opens_thought
from trimaran.text.tools import Tools

TURNS = 4  # latest ends of turns that the prefix cache is told of: where an edit or another answer would branch off


@dataclass(frozen=True)
class ChatAsk:
    """A conversation, ready for the engine. opened: the prompt ends inside a thought. tools: those that calls are read
    for. swap: an answer that is all thought is repeated as content. shown: whether thoughts are handed out.
    one_call: calls after the first are left out. stop_ids: the request's own."""

    request: Request
    opened: bool
    stop_ids: tuple[int, ...] = ()
    tools: Tools | None = None
    swap: bool = False
    shown: bool = True
    one_call: bool = False


@dataclass(frozen=True)
class CompletionAsk:
    """Prompts, ready for the engine. echoes: their texts where those are to be repeated, else "". stop_ids: the
    request's own."""

    requests: list[Request]
    echoes: list[str]
    stop_ids: tuple[int, ...] = ()


def chat_ask(body: ChatRequest, service: Service) -> ChatAsk:
    """Checks a conversation against the model and the server's limits, and writes its prompt."""
    settings, limits = service.settings, service.settings.limits
    if len(body.messages) > limits.messages:
        raise Problem(400, f"{len(body.messages)} messages; allowed: at most {limits.messages}", param="messages")
    tops = body.top_logprobs or 0
    if tops and not body.logprobs:
        raise Problem(400, "top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
    tools = tools_of(body, service)
    reasoning = reasoning_of(body, settings, service.template)
    ids, ends = prompt_of(body.messages, tools, reasoning, service)
    opened = service.folder.base is None and opens_thought(service.tokenizer, ids)
    most = max_tokens_of(body) or default_tokens(len(ids), settings.chat_tokens, service)
    sampling = sampling_of(body, service, most, bool(body.logprobs))
    request = Request(
        tuple(ids),
        sampling,
        priority=body.priority or 0,
        guide=guide_of(body, service.forms, tools, reasoning, opened),
        turns=tuple(ends[-TURNS:]),
        top_logprobs=at_most(tops, limits.top_logprobs, "top_logprobs"),
    )
    return ChatAsk(
        request,
        opened,
        stop_ids=tuple(body.stop_token_ids or ()),
        tools=None if body.tool_choice == "none" else tools,
        swap=reasoning.swap,
        shown=body.include_reasoning is not False,
        one_call=body.parallel_tool_calls is False,
    )


def completion_ask(body: CompletionRequest, service: Service) -> CompletionAsk:
    """Checks prompts against the model and the server's limits."""
    limits = service.settings.limits
    lead = () if body.add_special_tokens is False else service.folder.lead
    prompts = prompts_of(body, limits)
    if body.echo and body.logprobs is not None:
        raise Problem(400, "echo with logprobs: prompts are not scored; leave one out", param="echo")
    sampling = sampling_of(
        body, service, body.max_tokens or service.settings.completion_tokens, body.logprobs is not None
    )
    tops = at_most(body.logprobs or 0, limits.top_logprobs, "logprobs")
    guide = guide_of(body, service.forms)
    requests: list[Request] = []
    echoes: list[str] = []
    for prompt in prompts:
        ids = (*lead, *encoded(prompt, service, "prompt")) if isinstance(prompt, str) else tuple(prompt)
        requests.append(Request(ids, sampling, priority=body.priority or 0, guide=guide, top_logprobs=tops))
        echoes.append("")
        if body.echo:
            echoes[-1] = prompt if isinstance(prompt, str) else decoded(prompt, service, "prompt")
    return CompletionAsk(requests, echoes, tuple(body.stop_token_ids or ()))


def prompts_of(body: CompletionRequest, limits: Limits) -> list[str] | list[Sequence[int]]:
    """The prompts of a completion request, one or many, as texts or as ids."""
    prompt: Any = body.prompt
    many = prompt if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)) else [prompt]
    if not many:
        raise Problem(400, "no prompts; give at least one", param="prompt")
    if len(many) > limits.prompts:
        raise Problem(400, f"{len(many)} prompts; allowed: at most {limits.prompts}", param="prompt")
    return many


def prompt_of(
    messages: Sequence[ChatMessage],
    tools: Tools | None,
    reasoning: Reasoning,
    service: Service,
    generation_prompt: bool = True,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the numbers of tokens after which the assistant's turns in it end.

    A base model has learnt no template: the texts are put together as they are, and it goes on from there.
    """
    if service.folder.base:
        if tools is not None:
            raise Problem(400, f"tools for a base model ({service.folder.base}); leave them out", param="tools")
        return [*service.folder.lead, *encoded(plain_text(messages), service, "messages")], []
    try:
        chat = encode_chat(
            service.tokenizer,
            [message_of(message) for message in messages],
            generation_prompt=generation_prompt,
            tools=None if tools is None else tools.definitions,
            **reasoning.template_options(),
        )
    except Refusal as problem:
        raise refused(problem, "messages") from None
    return chat.ids, [stop for _, stop in chat.spans if 0 < stop < len(chat.ids)]


def message_of(message: ChatMessage) -> dict[str, Any]:
    """A message as templates read it."""
    given: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    given["content"] = text_of(message)
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None:
        given["reasoning_content"] = reasoning
    if message.tool_calls:
        given["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    if message.tool_call_id is not None:
        given["tool_call_id"] = message.tool_call_id
    return given


def text_of(message: ChatMessage) -> str:
    """The content of a message, its parts put together."""
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def plain_text(messages: Sequence[ChatMessage]) -> str:
    """A conversation as one text: what was said, each question on a line of its own."""
    text = ""
    for message in messages:
        text += ("\n" if text and message.role != "assistant" else "") + text_of(message)
    return text


def tools_of(body: ChatRequest, service: Service) -> Tools | None:
    """The tools on offer; None without any. Refuses a choice among them that they do not allow."""
    limits = service.settings.limits
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise Problem(400, "tool_choice without tools; give the tools", param="tool_choice")
        return None
    try:
        tools = Tools([tool.model_dump(exclude_none=True) for tool in body.tools], limits.tools)
    except Refusal as problem:
        raise refused(problem, "tools") from None
    if isinstance(choice, NamedTool) and choice.function.name not in tools.names:
        known = ", ".join(tools.names[:8])
        raise Problem(400, f"tool_choice names {choice.function.name!r}; allowed: {known}", param="tool_choice")
    return None if choice == "none" else tools


def sampling_of(body: Generation, service: Service, most: int, logprobs: bool) -> Sampling:
    """How to draw, within the limits."""
    limits = service.settings.limits
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    at_most(len(stops), limits.stop, "stop")
    at_most(max(map(len, stops), default=0), limits.stop_length, "stop", "characters of a stop string")
    if "" in stops:
        raise Problem(400, "an empty stop string; give at least a character", param="stop")
    ends = () if body.ignore_eos else service.tokenizer.stop_ids
    given = {
        "temperature": body.temperature,
        "top_k": None if body.top_k == -1 else body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "max_tokens": at_most(most, limits.max_tokens, "max_tokens"),
        "stop": tuple(stops),
        "stop_ids": tuple(dict.fromkeys([*(body.stop_token_ids or ()), *ends])),
        "ignore_eos": body.ignore_eos,
        "samples": None if body.n is None else at_most(body.n, limits.n, "n"),
        "seed": body.seed,
        "logprobs": logprobs,
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def max_tokens_of(body: ChatRequest) -> int | None:
    """The longest answer wanted, by either of OpenAI's names."""
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        message = f"max_completion_tokens = {new} and max_tokens = {old} disagree; leave one out"
        raise Problem(400, message, param="max_tokens")
    return old if new is None else new


def default_tokens(prompt_tokens: int, default: int, service: Service) -> int:
    """The default length of an answer, or what the engine's memory holds beside the prompt where that is less."""
    return default if service.longest is None else max(1, min(default, service.longest - prompt_tokens))


def at_most(value: int, limit: int, param: str, what: str | None = None) -> int:
    """`value`, or a problem when it is beyond the server's limit."""
    if value > limit:
        raise Problem(400, f"{what or param}: {value}; allowed on this server: at most {limit}", param=param)
    return value


def encoded(text: str, service: Service, param: str) -> list[int]:
    """Token ids of a text; control tokens written in it stay text."""
    try:
        return service.tokenizer.encode(text)
    except Refusal as problem:
        raise refused(problem, param) from None


def decoded(ids: Sequence[int], service: Service, param: str) -> str:
    """The text of token ids."""
    try:
        return service.tokenizer.decode(ids)
    except Refusal as problem:
        raise refused(problem, param) from None


def tokens_of(body: TokenizeRequest, service: Service) -> list[int]:
    """The ids that a text, or a conversation, is made of."""
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        lead = () if body.add_special_tokens is False else service.folder.lead
        return [*lead, *encoded(body.prompt, service, "prompt")]
    whole: dict[str, Any] = {"messages": body.messages, "chat_template_kwargs": body.chat_template_kwargs}
    chat = ChatRequest.model_construct(**{**whole, "tools": body.tools})
    reasoning = reasoning_of(chat, service.settings, service.template)
    prompts = body.add_generation_prompt is not False
    return prompt_of(body.messages or [], tools_of(chat, service), reasoning, service, prompts)[0]
