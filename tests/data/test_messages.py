"""Conversations are read as what they are, or refused by file and line."""

import json

import pytest

from trimaran.data.messages import chat_of, read
from trimaran.errors import Refusal

ASK = {"role": "user", "content": "Depth?"}
SAY = {"role": "assistant", "content": "Nine fathoms."}
THINK = {**SAY, "reasoning_content": "By the lead."}
TOOL = {"type": "function", "function": {"name": "sound", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "sound", "arguments": "{}"}}]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_messages_and_prompt_with_completion_are_the_same_conversation(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [ASK, SAY]}, {"prompt": "Depth?", "completion": "Nine fathoms."})
    first, second = read(path)
    assert first.digest == second.digest and first.learns == (False, True) and second.place == f"{path}, line 2"
    longer = chat_of({"prompt": [ASK, SAY, ASK], "completion": [THINK]}, "here")
    assert longer.learns == (False, False, False, True)


def test_a_folder_is_read_file_by_file_and_nulls_are_left_out(tmp_path):
    write(tmp_path / "b.jsonl", {"messages": [ASK, {**SAY, "tool_calls": None}], "tools": None, "id": 7})
    write(tmp_path / "a.jsonl", {"messages": [ASK, THINK]}, "")
    assert [chat.thinks for chat in read(tmp_path)] == [True, False]
    assert "tool_calls" not in read(tmp_path)[1].messages[1]


def test_an_answers_own_think_tags_are_its_thought():
    own = {"role": "assistant", "content": "<think>\nBy the lead.\n</think>\nNine fathoms."}
    assert chat_of({"messages": [ASK, own]}, "").messages[1] == THINK
    broken = {"role": "assistant", "content": "<think> and </think> are tags"}
    assert not chat_of({"messages": [ASK, {**broken, "content": "a " + broken["content"]}]}, "").thinks


def test_parts_are_one_text_and_developers_are_heard_as_they_are_when_served():
    parts = [{"type": "text", "text": "<think>By "}, {"type": "text", "text": "the lead.</think>"}, "Nine fathoms."]
    messages = [{"role": "developer", "content": "Be brief."}, ASK, {"role": "assistant", "content": parts}]
    assert chat_of({"messages": messages}, "").messages == ({"role": "system", "content": "Be brief."}, ASK, THINK)


def test_thinking_false_takes_the_thoughts_away():
    chat = chat_of({"messages": [ASK, THINK], "thinking": False, "budget": 5}, "")
    assert not chat.thinking and chat.messages == (ASK, SAY) and chat.budget is None
    assert chat_of({"messages": [ASK, THINK]}, "").without_thoughts().digest == chat.digest


def test_a_message_of_weight_nought_is_read_and_not_learnt():
    chat = chat_of({"messages": [ASK, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1}]}, "")
    assert chat.learns == (False, False, False, True) and chat.messages[1] == SAY


def test_earlier_thoughts_make_an_example_of_each_question():
    chat = chat_of({"messages": [ASK, THINK, ASK, SAY, ASK, THINK]}, "")
    parts = chat.unfolded()
    assert [len(part.messages) for part in parts] == [2, 4, 6]
    assert [part.learns for part in parts] == [(False,) * n + (True,) for n in (1, 3, 5)]
    plain = chat_of({"messages": [ASK, SAY, ASK, THINK]}, "")
    assert plain.unfolded() == [plain]
    loop = chat_of({"messages": [ASK, {**CALL, **THINK}, {"role": "tool", "content": "9"}, THINK], "tools": [TOOL]}, "")
    assert loop.unfolded() == [loop], "the template keeps thoughts after the last question"


BAD = {
    "no JSON": ('{"messages": ', r"x.jsonl, line 2: no JSON .*allowed: one JSON table a line"),
    "a list": ("[]", "line 2: a list"),
    "no messages": ({"conversations": []}, "line 2: a row with 'conversations'"),
    "no roles": ({"messages": [{"from": "human", "value": "?"}]}, "line 2: a message without a role .*'from', 'value'"),
    "a question under another name": (
        {"messages": [{"role": "user", "value": "?"}, SAY]},
        "role 'user' without content .*'role', 'value'",
    ),
    "another role": ({"messages": [ASK, {**SAY, "role": "asistant"}, ASK, SAY]}, "did you mean 'assistant'"),
    "a number": ({"messages": [ASK, {**SAY, "content": 9}]}, "content of type int"),
    "an image": ({"messages": [{**ASK, "content": [{"type": "image_url"}]}, SAY]}, "no text .'image_url'"),
    "an odd part": ({"messages": [ASK, {**SAY, "content": [1]}]}, "no text .1."),
    "an odd thought": ({"messages": [ASK, {**SAY, "reasoning_content": 5}]}, "a thought of type int"),
    "odd calls": ({"messages": [ASK, {**SAY, "tool_calls": 5}]}, "tool_calls is a int"),
    "a text as messages": ({"messages": "hello"}, "messages is a str"),
    "nobody answers": ({"messages": [ASK]}, "line 2: no answer to learn"),
    "no message": ({"messages": []}, "line 2: no answer to learn"),
    "nothing learnt": ({"messages": [ASK, {**SAY, "weight": 0}]}, "line 2: no answer to learn"),
    "empty answer": ({"messages": [ASK, {**SAY, "content": " \n"}]}, "line 2: an empty answer"),
    "a thought alone": ({"messages": [ASK, {**THINK, "content": ""}]}, "line 2: an empty answer"),
    "ends with a question": ({"messages": [ASK, SAY, ASK]}, "line 2: the last message is of role 'user'"),
    "no such tool": ({"messages": [ASK, CALL], "tools": []}, "unknown tool 'sound'; allowed: no call"),
    "another tool": (
        {"messages": [ASK, {**CALL, "tool_calls": [{"function": {"name": "soud"}}]}], "tools": [TOOL]},
        "unknown tool 'soud'; allowed: sound",
    ),
    "odd tools": ({"messages": [ASK, SAY], "tools": [{"name": 5}]}, "line 2: "),
    "odd thinking": ({"messages": [ASK, SAY], "thinking": "yes"}, "thinking = 'yes'"),
    "odd budget": ({"messages": [ASK, SAY], "budget": "5"}, "budget = '5'"),
    "odd weight": ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "weight 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_learnt_is_refused_by_its_line(case, tmp_path):
    row, said = BAD[case]
    with pytest.raises(Refusal, match=said):
        read(write(tmp_path / "x.jsonl", {"messages": [ASK, SAY]}, row))


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(Refusal, match="no file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(Refusal, match=r"no \*.jsonl"):
        read(tmp_path)
    with pytest.raises(Refusal, match="is empty"):
        read(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match="is not text"):
        read(tmp_path / "bytes.jsonl")
