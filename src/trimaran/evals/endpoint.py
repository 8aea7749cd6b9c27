"""Episodes with a server that speaks OpenAI's protocol: `trimaran score FOLDER TASKS --endpoint URL`.

FOLDER takes the records. Several episodes run at once; their answers are those of chat completions, asked with the same
settings and seeds as a local model is (what an OpenAI server has no word for goes into the body as vLLM spells it, and
only where it is not the default). The official client retries what is worth retrying, with growing pauses: no
connection, time-outs, 408, 409, 429, 5xx. A request that fails for good is an error in the episode's record, never a
score, and the same command plays it again.
"""

import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.evals.play import Group, PlaySettings, guarded, judged, seed_of
from trimaran.tasks.episode import Episode, Said, episode
from trimaran.tasks.task import Message, Prompt, Task, Trace

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
AHEAD = 2  # episodes asked for ahead of those that run


class EndpointSettings(Settings):
    """A server. Its key is read from the environment, OPENAI_API_KEY; never written anywhere."""

    url: str
    model: str | None = None  # None: the only one that it serves
    concurrency: int = Field(8, ge=1)  # episodes at once
    retries: int = Field(5, ge=0)  # of a request, after its first failure
    timeout: float = Field(300.0, gt=0)  # seconds for one answer


@dataclass
class Heard:
    """A conversation as it was sent and heard: messages, and the tokens of thoughts where the server counts them."""

    messages: list[Message] = field(default_factory=list)
    tokens: int = 0
    thought_tokens: int = 0

    def thoughts(self) -> int:
        return self.thought_tokens


@dataclass(frozen=True)
class Answered:
    """An episode that is over, as `Played` is; the engine's outputs are not there to be seen."""

    group: int
    sample: int
    prompt: Prompt
    conversation: Heard
    trace: Trace | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    outputs: tuple[()] = ()

    @property
    def tokens(self) -> int:
        return self.conversation.tokens


class Endpoint:
    """A server to play episodes with. Raises Refusal where there is no client, no server, or more than one model."""

    def __init__(self, settings: EndpointSettings):
        self.settings, self.client = settings, client_of(settings)
        self.model = settings.model or self.only_model()

    def only_model(self) -> str:
        from openai import OpenAIError

        try:
            found = [model.id for model in self.client.models.list()]
        except OpenAIError as problem:
            raise Refusal(
                f"{self.settings.url}: {problem}",
                "the address of a server, such as http://127.0.0.1:8000/v1",
                "correct it, or start the server",
            ) from None
        if len(found) != 1:
            raise Refusal(f"{len(found)} models at {self.settings.url}", ", ".join(found), "say endpoint.model=NAME")
        return str(found[0])

    def play(self, groups: Iterable[Group]) -> Iterator[Answered]:
        """The episodes of all groups, each as it ends; leaving early lets those that run come to their end unheard."""
        waiting = ((place, group, sample) for place, group in enumerate(groups) for sample in range(group.samples))
        running: set[Future[Answered]] = set()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                while True:
                    while len(running) < AHEAD * self.settings.concurrency and (one := next(waiting, None)):
                        running.add(pool.submit(self.episode, *one))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def episode(self, place: int, group: Group, sample: int) -> Answered:
        """One episode. What fails, at the server or in the task's code, ends this one alone."""
        from openai import OpenAIError

        heard, said = Heard(), None
        course = episode(group.task, group.prompt, group.settings.turns)
        while True:
            found, error = guarded(partial(step, course, said, heard, group.task))
            if error is not None:
                return Answered(place, sample, group.prompt, heard, error=error)
            if found is not None:
                return Answered(place, sample, group.prompt, heard, *found)
            try:
                said = self.answer(group, sample, heard)
            except OpenAIError:
                return Answered(place, sample, group.prompt, heard, error=traceback.format_exc())
            heard.messages.append(said.message)

    def answer(self, group: Group, sample: int, heard: Heard) -> Said:
        """The next answer of a conversation."""
        turn = sum(message["role"] == "assistant" for message in heard.messages)
        body = request_of(group, heard.messages, seed_of(group, sample, turn))
        completion = self.client.chat.completions.create(model=self.model, **body)
        choice, usage = completion.choices[0], completion.usage
        if usage is not None:
            heard.tokens += usage.completion_tokens
            details = usage.completion_tokens_details
            heard.thought_tokens += (details.reasoning_tokens or 0) if details is not None else 0
        return Said(message_of(choice.message.model_dump(exclude_none=True)), cut=choice.finish_reason == "length")


def step(course: Episode, said: Said | None, heard: Heard, task: Task) -> tuple[Trace, dict[str, float]] | None:
    """Hears what the task says next; the episode's end and its scores, where it says nothing more."""
    try:
        heard.messages += next(course) if said is None else course.send(said)
    except StopIteration as over:
        return judged(task, over.value)
    return None


def client_of(settings: EndpointSettings) -> "OpenAI":
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        raise Refusal("--endpoint without the openai client", "the extra", "pip install trimaran[endpoint]") from None
    key = os.environ.get(KEY, "none")
    return OpenAI(base_url=settings.url, api_key=key, max_retries=settings.retries, timeout=settings.timeout)


def request_of(group: Group, messages: Iterable[Message], seed: int) -> dict[str, Any]:
    """The body of a chat completion, without the model."""
    settings, tools = group.settings, list(group.prompt.tools)
    body: dict[str, Any] = {
        "messages": sent(messages),
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": seed,
    }
    if tools:
        body["tools"] = tools
    plain, more = PlaySettings(), dict[str, Any]()
    for name in ("top_k", "min_p"):
        if getattr(settings, name) != getattr(plain, name):
            more[name] = getattr(settings, name)
    if not (settings.thinking and group.prompt.thinking):
        more["chat_template_kwargs"] = {"enable_thinking": False}
    elif settings.budget is not None:
        more["thinking_budget"] = settings.budget
    return body | ({"extra_body": more} if more else {})


def sent(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as the protocol wants them: a tool's answer names the call it belongs to, in the order of the calls."""
    found, calls = list[dict[str, Any]](), list[str]()
    for message in map(dict, messages):
        if message["role"] == "assistant" and message.get("tool_calls"):
            calls = [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and "tool_call_id" not in message and calls:
            message["tool_call_id"] = calls.pop(0)
        found.append(message)
    return found


def message_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """A server's message as tasks read it; a thought may come as `reasoning_content` or as `reasoning`."""
    message: dict[str, Any] = {"role": "assistant", "content": said.get("content") or ""}
    if thought := said.get("reasoning_content") or said.get("reasoning"):
        message["reasoning_content"] = thought
    if calls := said.get("tool_calls"):
        message["tool_calls"] = json.loads(json.dumps(calls))
    return message
