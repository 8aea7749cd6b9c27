"""The bodies of answers, in OpenAI's form. Only fields that were set are sent."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """A table of an answer."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def document(self) -> dict[str, Any]:
        """As JSON's tables and lists."""
        return self.model_dump(exclude_unset=True)

    def event(self) -> bytes:
        """As one event of a stream."""
        return b"data: " + self.model_dump_json(exclude_unset=True).encode() + b"\n\n"


# errors


class ErrorBody(Reply):
    """What went wrong: for people, for machines, and which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    """Every answer that is not 2xx."""

    error: ErrorBody


# usage


class PromptDetails(Reply):
    """cached_tokens: tokens of the prompt that the prefix cache spared."""

    cached_tokens: int


class CompletionDetails(Reply):
    """reasoning_tokens: tokens of the answer before its thought was closed, tags not counted."""

    reasoning_tokens: int


class Work(Reply):
    """What the answer took: tokens drafted and accepted, passes of the model, tokens per second after the first."""

    drafted: int
    accepted: int
    passes: int
    cached_tokens: int
    tokens_per_second: float | None


class Usage(Reply):
    """Tokens, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    x_trimaran: Work


# log-probabilities


class TopLogprob(Reply):
    """A token and the natural logarithm of its probability under the model's own law."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The same for a token that was chosen, beside the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """One entry a token, thoughts and tags included."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Reply):
    """The older form: columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


# chat


class CalledFunction(Reply):
    """A call's function and its arguments as JSON text; in a stream, pieces of them."""

    name: str | None = None
    arguments: str


class ToolCall(Reply):
    """A call of a tool. In a stream `index` says which, and only the first piece has id, type and name."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Reply):
    """What the assistant said, or in a stream what is new of it. Both names of the reasoning hold the same."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    """One answer. stop_reason: the stop string or the id of the stop token that ended it, if one of the request's."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None


class ChatCompletion(Reply):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(Reply):
    """What is new of one answer."""

    index: int
    delta: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None
    stop_reason: int | str | None = None


class ChatChunk(Reply):
    """One event of a streamed answer; the last has no choices but the usage, where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


# plain completions


class CompletionChoice(Reply):
    """One continuation, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None
    stop_reason: int | str | None = None


class Completion(Reply):
    """Answer of /v1/completions, and an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# the rest


class ModelCard(Reply):
    """A name that the model answers to. base: why it is a base model, null where it has learnt to converse."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["trimaran"] = "trimaran"
    root: str
    max_model_len: int | None
    base: str | None


class ModelList(Reply):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Reply):
    """Answer of /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Prompt(Reply):
    """Answer of /detokenize."""

    prompt: str


class Health(Reply):
    """Answer of /health: ok, or with 503 why not."""

    status: Literal["ok", "draining", "stalled"]
