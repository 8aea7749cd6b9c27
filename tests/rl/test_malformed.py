"""Answers that are none: tags in what is said, calls without arguments that can be read."""

import pytest

from tests.rl import toys
from tests.rl.test_agreement import rolled
from trimaran.evals.play import Player
from trimaran.rl.rollout import malformed
from trimaran.tasks.task import Prompt
from trimaran.text.conversation import Conversation

LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
CALL = "<tool_call>\n<function=look>\n<parameter=at>\nsea\n</parameter>\n</function>\n</tool_call>"
ANSWERS = {
    "words": ("plain words", False),
    "a thought": ("so</think>done", False),
    "a call": (f"so</think>{CALL}", False),
    "a second end of thought": ("so</think>done</think>again", True),
    "a call cut in half": (f"so</think>{CALL[:40]}", True),
    "a call that does not open": (f"so</think>done{CALL[-12:]}", True),
    "a call in the thought": (f"{CALL}</think>done", False),
}


@pytest.mark.parametrize(("said", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_what_is_malformed(said, expected):
    words = toys.tokenizer()
    conversation = Conversation(words, [LOOK])
    conversation.hear([{"role": "user", "content": "?"}])
    conversation.answer([*words.encode(said, specials=True), words.stop_ids[-1]])
    assert malformed(conversation.messages[1:], True) == expected


def test_history_in_the_prompt_is_nobodys_answer():
    called = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}]
    asked = (
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>", "tool_calls": called},
        {"role": "tool", "content": "calm"},
    )

    class Told(toys.Capitals):
        def prompt(self, number, split="train"):
            return Prompt("told", split, number, asked, (LOOK,), thinking=False)

    model, words = toys.pair("mamba")
    assert not any(one.malformed for one in rolled(Player(toys.engine(model, words)), Told(), prompts=1))
