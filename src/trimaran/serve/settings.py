"""Settings of `trimaran serve`: where it listens, who may ask, and how much at once."""

import os
from typing import Literal

from pydantic import Field, field_validator

from trimaran.config import Settings
from trimaran.engine.constrain import ConstraintLimits
from trimaran.engine.request import EngineSettings
from trimaran.ops.backend import OpsSettings
from trimaran.text.tools import ToolLimits

KEY = "TRIMARAN_API_KEY"


class Limits(Settings):
    """The most that one request may ask for. Beyond: 413 for the body's bytes, 400 for the rest."""

    body_bytes: int = Field(4 * 2**20, ge=1024)
    body_seconds: float = Field(30, gt=0)  # a body that takes longer to arrive is given up: 408
    json_depth: int = Field(64, ge=8)  # brackets inside brackets
    prompt_tokens: int | None = Field(None, ge=1)  # None: what the engine's memory holds
    max_tokens: int = Field(32768, ge=1)
    prompts: int = Field(64, ge=1)  # of one completion request
    n: int = Field(16, ge=1)  # answers to one prompt
    stop: int = Field(16, ge=0)  # stop strings
    stop_length: int = Field(256, ge=1)  # characters of one
    top_logprobs: int = Field(20, ge=0)
    messages: int = Field(2048, ge=1)
    tools: ToolLimits = ToolLimits()
    forms: ConstraintLimits = ConstraintLimits()  # JSON schemas, regular expressions, choices, grammars


class ServeSettings(Settings):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    api_key: str | None = Field(None, min_length=1)  # None: what TRIMARAN_API_KEY holds; unset too: none is asked for
    names: tuple[str, ...] = ()  # that the model answers to; the first is shown; none: the folder's name
    allowed_hosts: tuple[str, ...] = ()  # beside this machine's own; "*": any. None given: see serve/hosts.py
    origins: tuple[str, ...] = ()  # pages of other origins that browsers may let in (CORS)
    limits: Limits = Limits()
    chat_tokens: int = Field(4096, ge=1)  # of an answer where the request names no limit
    completion_tokens: int = Field(16, ge=1)  # the same for /v1/completions: OpenAI's own default
    thinking: bool = True  # whether answers begin with a thought where the request does not say
    reasoning_budget: int | None = Field(None, ge=0)  # tokens of thought where the request names no budget
    reasoning_grace: int = Field(0, ge=0)  # tokens past the budget to wait for the end of a line
    queue: int = Field(256, ge=1)  # requests that may wait; the next is answered 429
    request_seconds: float = Field(600, gt=0)  # a request that takes longer is given up: 408
    drain_seconds: float = Field(60, ge=0)  # after SIGTERM, for what is running to finish
    stall_seconds: float = Field(120, gt=0)  # without a finished pass, after which /health answers 503
    access_log: bool = False  # one line on stderr per request

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if host != "*" and (not host or set(host) & set("*/@ ") or (":" in host and "::" not in host)):
                raise ValueError(f"{host!r} is no host: give names or addresses without scheme and port, or *")
        return hosts

    def key(self) -> str | None:
        """The key that is asked for, if any."""
        return self.api_key or os.environ.get(KEY) or None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class ServerSettings(Settings):
    """All that `trimaran serve` takes."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    draft_model: str | None = None  # folder of a small model with the same tokenizer, for engine.drafter=model
    serve: ServeSettings = ServeSettings()
    engine: EngineSettings = EngineSettings()
    ops: OpsSettings = OpsSettings()
