"""`trimaran chat` with a model that thinks: a chain of tokens written into its embedding and head."""

import os
import pty
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.engine.test_verbs import own, pipe_in, read_until
from tests.models import chained
from trimaran import config
from trimaran.engine import chat
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.text.chat import encode_chat
from trimaran.text.tokenizer import Tokenizer

THOUGHT, SAID = "boats? hulk!", "Aye, 日"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tokenizer) -> Path:
    """A run folder of a model that thinks THOUGHT and says SAID."""
    line_end, close, end = tokenizer.encode("\n")[0], tokenizer.id_of("</think>"), tokenizer.id_of("<|im_end|>")
    chain = [line_end, *tokenizer.encode(THOUGHT), close, *tokenizer.encode(SAID), end]
    folder = tmp_path_factory.mktemp("runs") / "thinker"
    assert len(set(chain)) == len(chain), "a chain in which no token comes twice"
    hub.save(chained(dict(pairwise(chain)), tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    (folder / "recipe.toml").write_text('stage = "sft"\n')
    return folder


def talk(folder: Path, given: str, capsys, monkeypatch, *words: str) -> tuple[str, str]:
    """stdout and stderr of a chat on pipes."""
    pipe_in(monkeypatch, given.encode())
    chat.main(str(folder), ["temperature=0", *words])
    return capsys.readouterr()


def test_answers_go_to_stdout_and_thoughts_are_folded(thinker, tokenizer, capsys, monkeypatch):
    out, err = talk(thinker, "hull\n/thought\n", capsys, monkeypatch)
    assert out == f"{SAID}\n{THOUGHT}\n"
    assert err == f"[thought: {len(tokenizer.encode(THOUGHT))} tokens]\n"


def test_thoughts_can_be_shown(thinker, tokenizer, capsys, monkeypatch):
    out, err = talk(thinker, "hull\n", capsys, monkeypatch, "fold=false")
    assert out == f"{SAID}\n"
    assert err == f"{THOUGHT}\n[thought: {len(tokenizer.encode(THOUGHT))} tokens]\n"


def test_a_thought_that_takes_all_tokens_is_told(thinker, capsys, monkeypatch):
    out, err = talk(thinker, "/thought\nhull\n/thought\n", capsys, monkeypatch, "max_tokens=3")
    assert re.fullmatch(r"There was no thought\.\n\n(.+)\n", out) and THOUGHT.startswith(out.split("\n")[2])
    assert err == "[thought: 3 tokens, not finished]\n"


def test_what_was_thought_and_said_is_remembered_apart(thinker, tokenizer):
    settings = chat.ChatSettings(temperature=0)
    conversation = chat.Conversation(chat.Speaker(chat.open_folder(str(thinker), settings), settings))
    conversation.turn("hull")
    answer = {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT}
    assert conversation.messages == [{"role": "user", "content": "hull"}, answer]
    ids = encode_chat(tokenizer, conversation.messages).ids
    assert tokenizer.decode(ids).endswith(f"<think>\n{THOUGHT}\n</think>\n{SAID}<|im_end|>\n")


def speaker(folder: Path, *words: str) -> chat.Speaker:
    settings = config.load(chat.ChatSettings, None, ["temperature=0", *words])
    return chat.Speaker(chat.open_folder(str(folder), settings), settings)


def test_a_turn_reads_what_is_new_since_the_last(chat_run, tokenizer, capsys):
    one = speaker(chat_run, "thinking=false", "max_tokens=30")
    conversation, known = chat.Conversation(one), 0
    for line in ("hull", "boats", "a hull and the boat"):
        before, said = one.engine.stats(), list(conversation.messages)
        conversation.turn(line)
        after = one.engine.stats()
        read = after.prompt_tokens - before.prompt_tokens - (after.cached_tokens - before.cached_tokens)
        prompt = encode_chat(tokenizer, [*said, conversation.messages[-2]], generation_prompt=True, thinking=False).ids
        # an answer that was cut off (it is here) is read once more, for the template ends it
        assert read <= len(prompt) - known
        known = len(prompt) - 1
    assert capsys.readouterr().out.count("\n") == 3 and known > 60


def test_a_thought_that_the_template_drops_is_not_in_the_way(thinker, tokenizer, capsys):
    one = speaker(thinker)
    conversation = chat.Conversation(one)
    for _ in range(2):
        conversation.turn("hull")
    earlier = len(encode_chat(tokenizer, conversation.messages[:-1], generation_prompt=True).ids)
    before = one.engine.stats().cached_tokens
    conversation.turn("hull")
    # all of the prompt before but its last token: the line end after <think>, in whose place there is </think> now
    assert one.engine.stats().cached_tokens - before == earlier - 1
    assert capsys.readouterr().out == f"{SAID}\n" * 3


def test_drafters_say_the_same(chat_run, capsys):
    said = {}
    for words in ((), ("draft=3",), ("engine.drafter=lookup",), ("engine.drafter=model", f"draft_model={chat_run}")):
        one = speaker(chat_run, "thinking=false", "max_tokens=30", *words)
        conversation = chat.Conversation(one)
        conversation.turn("hull")
        conversation.turn("boats")
        said[words] = capsys.readouterr().out
        assert (one.engine.drafted > 0) == bool(words)
    assert len(set(said.values())) == 1


def test_two_drafters_are_refused(chat_run):
    with pytest.raises(Refusal, match=r'^draft = 2 with engine\.drafter = "lookup"; allowed: one of them; next: '):
        speaker(chat_run, "draft=2", "engine.drafter=lookup")


def test_a_conversation_beyond_the_memory_can_go_on_where_it_is_typed(chat_run, capsys):
    conversation = chat.Conversation(speaker(chat_run, "engine.rows=1", "max_tokens=8", "thinking=false"))
    with pytest.raises(Refusal, match="what the memory holds, 128 pages x 32 = 4096 tokens"):
        chat.turn(conversation, "z" * 5000, typed=False)
    chat.turn(conversation, "z" * 5000, typed=True)
    assert "what the memory holds" in capsys.readouterr().err and not conversation.messages
    chat.turn(conversation, "hull", typed=True)
    assert conversation.messages[0]["content"] == "hull"


def test_the_line_of_a_thought_fits_the_terminal(thinker, tokenizer, monkeypatch):
    telling = chat.Telling(tokenizer, opened=True, fold=True)
    telling.reader.push("a\n\x1b[2J" + "日本" * 100)
    for columns in (20, 40, 41, 80):
        monkeypatch.setattr(chat, "terminal_columns", lambda stream, columns=columns: columns)
        line = telling._line()
        assert chat.cell_len(line) < max(columns, 24) and line.isprintable()
        assert columns < 30 or chat.cell_len(line) >= columns - 3


def test_a_thought_on_a_terminal_is_one_line_that_counts(thinker, tokenizer: Tokenizer):
    count = len(tokenizer.encode(THOUGHT))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trimaran", "chat", thinker, "temperature=0"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"} | {"NO_COLOR": ""}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own, env=environment
    )
    os.close(theirs)
    try:
        read_until(ours, "you> ")
        os.write(ours, b"hull\n")
        shown = read_until(ours, "you> ")
        number = shown.index(f"\r\x1b[K\x1b[2m[thought: {count} tokens]\x1b[0m\r\n{SAID}\r\n")
        lines = re.findall(r"\r\x1b\[K\x1b\[2m\[thinking: (\d+) tokens\] ?(.*?)\x1b\[0m", shown[:number])
        assert [int(line[0]) for line in lines] == list(range(1, count + 1))
        assert "\n" not in shown[shown.index("[thinking") : number], "one line, drawn anew"
        assert lines[-1][1] and THOUGHT.endswith(lines[-1][1])
        os.write(ours, b"/thought\n")
        assert f"\x1b[2m{THOUGHT}\x1b[0m" in read_until(ours, "you> ")
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
