"""Answers that are none: tags in what is said, calls without arguments that can be read."""

import pytest

from tests.rl import toys
from trimaran.rl.rollout import malformed
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
    assert malformed(conversation) == expected
