"""The bodies of requests: OpenAI's fields, vLLM's and NIM's beside them, each with what it must look like.

What a value has to do with the others, with the model and with the limits of the server is looked at in `translate`.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from trimaran.serve.neutral import CHAT, COMPLETION, MESSAGE, TOOL, Neutral, without_neutral

Json = dict[str, Any]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Texts = str | Annotated[list[str], Field(max_length=1024)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]


class Body(BaseModel):
    """A table of a request: an unknown field is an error, and so is a value of another kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        return without_neutral(value, cls.neutral, cls.model_fields)


# messages


class TextPart(Body):
    """A part of a content. Text alone is understood."""

    neutral: ClassVar[Neutral] = {"cache_control": None, "prompt_cache_breakpoint": None, "annotations": None}

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(max_length=1024)]


class CalledFunction(Body):
    """What a tool was called with: JSON as text, as OpenAI writes it, or a table."""

    name: str
    arguments: str | Json = "{}"


class ToolCall(Body):
    """A call that an assistant message made."""

    neutral: ClassVar[Neutral] = {"index": None}

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation."""

    neutral: ClassVar[Neutral] = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=256)] | None = None
    tool_call_id: str | None = None


# tools and forms of the answer


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: OpenAI's form, of which functions are the only kind here."""

    neutral: ClassVar[Neutral] = TOOL

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Names a function."""

    name: Name


class NamedTool(Body):
    """The choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class SchemaForm(Body):
    """A JSON schema with OpenAI's words round it."""

    name: Name
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        return without_neutral(value, {}, {"name", "description", "schema", "strict"})


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaForm


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's form of the same: one of these."""

    neutral: ClassVar[Neutral] = {
        "disable_fallback": None,
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    json_: Json | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        return without_neutral(value, cls.neutral, {"json", "regex", "choice", "grammar", "json_object"})


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None  # a last chunk with the usage
    continuous_usage_stats: bool | None = None  # vLLM: the usage so far in every chunk


class NimExtensions(Body):
    """NIM's own table."""

    max_thinking_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None


# requests


class Generation(Body):
    """What chat and plain completions share."""

    model: str | None = None  # None: the one that is served
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # 0, -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=2**31)] | None = None
    stop: Texts | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # the smaller, the sooner
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream; set stream to true, or leave them out")
        return self


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    neutral: ClassVar[Neutral] = CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: Json | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=2**31)] | None = None  # vLLM
    reasoning_budget: Annotated[int, Field(ge=0, le=2**31)] | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=2**31)] | None = None
    nvext: NimExtensions | None = None
    reasoning_grace: Annotated[int, Field(ge=0, le=2**31)] | None = None
    include_reasoning: bool | None = None


class CompletionRequest(Generation):
    """Body of /v1/completions."""

    neutral: ClassVar[Neutral] = COMPLETION

    prompt: str | list[str] | list[Token] | list[list[Token]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Body):
    """Body of /tokenize: a text, or a conversation as the template writes it."""

    neutral: ClassVar[Neutral] = {"continue_final_message": (False,), "chat_template": ()}

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: Json | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=2**20)]
