import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.text.answer import read_answer
from trimaran.text.chat import encode_chat
from trimaran.text.thought import ThoughtCounter, opens_thought
from trimaran.text.tokenizer import Tokenizer

QUESTION = {"role": "user", "content": "Sea state? <think>"}
ANSWER = {"role": "assistant", "content": "Calm.", "reasoning_content": "Look."}


def test_a_prompt_opens_a_thought_where_its_own_turn_does(tokenizer):
    for messages in ([QUESTION], [QUESTION, ANSWER, QUESTION]):
        for thinking in (True, False):
            ids = encode_chat(tokenizer, messages, generation_prompt=True, thinking=thinking).ids
            assert opens_thought(tokenizer, ids) == thinking
            assert opens_thought(tokenizer, [*ids, *tokenizer.encode("Hm")]) == thinking
    assert not opens_thought(tokenizer, encode_chat(tokenizer, [QUESTION, ANSWER]).ids)
    assert not opens_thought(tokenizer, [])


def counted(tokenizer: Tokenizer, ids: list[int], opened: bool) -> int:
    counter = ThoughtCounter(tokenizer, opened)
    for identity in ids:
        counter.push(identity)
    return counter.count


@pytest.mark.parametrize("specials", [True, False], ids=["tags are tokens", "tags are spelt"])
def test_thoughts_are_counted(tokenizer, specials):
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, specials=specials)

    thought = tokenizer.encode("\nhm, hm\n")
    close, opening, said = ids("</think>"), ids("<think>"), tokenizer.encode("Aye, aye")
    end = tokenizer.id_of("<|im_end|>")
    for opened, before in ((True, []), (False, opening), (False, [*tokenizer.encode("\n"), *opening])):
        for inside in ([], thought, thought * 3):
            assert counted(tokenizer, [*before, *inside, *close, *said, *close, end], opened) == len(inside)
            assert counted(tokenizer, [*before, *inside, end], opened) == len(inside), "never closed"
    assert counted(tokenizer, [*said, *opening, *thought, *close], False) == 0, "a thought comes first or not at all"


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", "a", "é🙂", " ."]), max_size=10)


@given(PIECES.map("".join), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_count_is_that_of_what_the_reader_calls_thought(tokenizer, text, opened):
    single = [tokenizer.token_bytes.index(bytes([byte])) for byte in text.encode()]
    answer = read_answer(text, opened)
    counter = ThoughtCounter(tokenizer, opened)
    for identity in single:
        counter.push(identity)
    if not answer.reasoning and not opened:
        assert counter.count <= text.count("\n"), "line ends of an empty thought"
    assert counter.count >= len(answer.reasoning.encode())
    slack = sum(text.count(sign) for sign in (" ", "\n")) + len("<think>")
    assert counter.count <= len(answer.reasoning.encode()) + slack
    merged = tokenizer.encode(text)
    assert counted(tokenizer, merged, opened) <= counter.count
