"""A conversation as token ids that only ever grow: what was said is never written anew.

A chat template may render an earlier answer otherwise than the model wrote it (thoughts dropped, spaces trimmed, a call
spelt in its own way), so rendering all messages again at each turn would put words into the model's mouth. Here each
answer stays as the very tokens that were generated, and the template writes only what comes after it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimaran.errors import Refusal
from trimaran.text.answer import Answer, AnswerReader
from trimaran.text.chat import Span, encode_chat
from trimaran.text.template import Message
from trimaran.text.thought import ThoughtCounter, opens_thought
from trimaran.text.tokenizer import Tokenizer
from trimaran.text.tools import Tools


class Conversation:
    """Messages in turn: `hear` what is said to the model, `answer` with what it generates from `ids`.

    ids: all tokens so far. spans: (start, stop) in `ids` of each answer, as generated. messages: the same as messages.
    opened: whether the next answer begins inside a thought. tools: definitions of what may be called; thinking and
    `options`: for the chat template, as in `text.template.render`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        thinking: bool = True,
        **options: Any,
    ):
        self.tokenizer, self.tools = tokenizer, Tools(tools) if tools else None
        self.options = {**options, "thinking": thinking, "tools": self.tools.definitions if self.tools else None}
        self.ids: list[int] = []
        self.spans: list[Span] = []
        self.messages: list[Message] = []
        self.opened = self.due = False
        self._shown: list[Message] = []  # what the template is shown: stand-ins for the answers
        self._answers = 0  # assistant messages among them, up to the newest answer
        self._calls = 0

    def fork(self) -> "Conversation":
        """A copy that goes on by itself."""
        twin = object.__new__(Conversation)
        twin.__dict__ = {name: value.copy() if isinstance(value, list) else value for name, value in vars(self).items()}
        return twin

    def hear(self, messages: Sequence[Message]) -> None:
        """Appends what is said to the model (the prompt; a user's or tools' reply) and what its answer starts with.

        Raises Refusal for messages that the template does not take.
        """
        if self.due or not messages:
            found = "a second turn while an answer is due" if self.due else "a turn without messages"
            raise Refusal(found, "messages and answers in turn", "hand over all messages of a turn at once")
        shown = [*self._shown, *messages]
        chat = encode_chat(self.tokenizer, shown, generation_prompt=True, **self.options)
        self.ids += self._after_answer(chat.ids, chat.spans[self._answers - 1]) if self.spans else chat.ids
        self.messages += messages
        self._shown, self.due = shown, True
        self.opened = opens_thought(self.tokenizer, self.ids)

    def answer(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Takes what the model generated, its end token included where it came to one; the message that it makes.

        A call that ended halfway stands in the message with the unfinished arguments that the model wrote.
        """
        if not self.due:
            raise Refusal("an answer that nobody asked for", "messages and answers in turn", "hear messages first")
        start = len(self.ids)
        self.ids += tokens
        self.spans.append((start, len(self.ids)))
        ended = bool(tokens) and tokens[-1] in self.tokenizer.stop_ids
        reader = AnswerReader(self.opened, self.tools, new_id=self._new_id)
        reader.push(self.tokenizer.decode(tokens[:-1] if ended else tokens))
        reader.finish()
        message = reader.answer.message()
        self.messages.append(message)
        self._shown.append(stand_in(reader.answer))
        self._answers = sum(one.get("role") == "assistant" for one in self._shown)
        self.due = False
        return message

    def thoughts(self) -> int:
        """Tokens of all thoughts in the answers, think tags not counted."""
        total = 0
        for start, stop in self.spans:
            counter = ThoughtCounter(self.tokenizer, opens_thought(self.tokenizer, self.ids[:start]))
            for token in self.ids[start:stop]:
                counter.push(token)
            total += counter.count
        return total

    def _after_answer(self, ids: list[int], span: Span) -> list[int]:
        """What the template puts behind an answer: from its end token on, unless the model has said one itself."""
        stops, stop = self.tokenizer.stop_ids, span[1]
        rest = ids[stop - 1 :] if ids[stop - 1] in stops else ids[stop:]
        return rest[1:] if self.ids[-1] in stops and rest[0] in stops else rest

    def _new_id(self) -> str:
        """The same for the same conversation, so that its record is too."""
        self._calls += 1
        return f"call_{self._calls}"


def stand_in(answer: Answer) -> Message:
    """An answer as the template is shown it: its words do not matter, but a tool's reply may have to follow a call."""
    calls = answer.message().get("tool_calls", [])
    if calls and all(call.complete and isinstance(json.loads(call.arguments), dict) for call in answer.calls):
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": "assistant", "content": "."}


def check_template(tokenizer: Tokenizer) -> None:
    """Refuses a chat template whose generation prompt is not what its answers begin with."""
    question = {"role": "user", "content": "?"}
    chat = encode_chat(tokenizer, [question, {"role": "assistant", "content": "."}])
    start = chat.spans[0][0]
    for thinking in (True, False):
        prompt = encode_chat(tokenizer, [question], generation_prompt=True, thinking=thinking).ids
        if prompt[:start] == chat.ids[:start]:
            return
    found = "a chat template whose generation prompt is not how its answers begin"
    raise Refusal(found, "one that honours add_generation_prompt", "correct chat_template.jinja")
