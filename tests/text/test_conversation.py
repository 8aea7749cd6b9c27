import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.errors import Refusal
from trimaran.text.chat import encode_chat
from trimaran.text.conversation import Conversation, check_template
from trimaran.text.tokenizer import RESERVED, Tokenizer

PLACE = {"type": "object", "properties": {"place": {"type": "string"}, "day": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
QUESTION = {"role": "user", "content": "Sea state?"}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Look it up.",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"place": "Kiel", "day": 2}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "calm"}
ANSWER = {"role": "assistant", "content": "Calm.", "reasoning_content": "It says so."}
VOYAGE = [{"role": "system", "content": "Be brief."}, QUESTION, CALL, RESULT, RESULT, ANSWER, QUESTION, ANSWER]

# Keeps what it is given, and marks the answers itself, their end tokens left out.
FOREIGN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}"
    "{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def foreign(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.document, tokenizer.config, template)


def retold(tokenizer, messages, **options) -> Conversation:
    """A conversation in which the model says, token by token, what the template makes of its messages."""
    chat = encode_chat(tokenizer, messages, keep_thoughts=True, **options)
    conversation = Conversation(tokenizer, options.pop("tools", None) or (), **options)
    heard, spans = [], iter(chat.spans)
    for message in messages:
        if message["role"] != "assistant":
            heard.append(message)
            continue
        conversation.hear(heard)
        heard = []
        start, stop = next(spans)
        conversation.answer(chat.ids[start:stop])
    return conversation


def test_ids_are_those_of_the_whole_chat_where_the_template_forgets_nothing(tokenizer):
    conversation = retold(tokenizer, VOYAGE, tools=[WEATHER])
    chat = encode_chat(tokenizer, VOYAGE, keep_thoughts=True, tools=[WEATHER])
    assert conversation.spans == chat.spans and len(chat.spans) == 3
    assert conversation.ids == chat.ids[: len(conversation.ids)]
    assert tokenizer.decode(chat.ids[len(conversation.ids) :]) == "\n"  # what would follow the last answer
    assert conversation.messages == VOYAGE  # read back as they were told, call ids included
    thoughts = [CALL["reasoning_content"], *[ANSWER["reasoning_content"]] * 2]
    assert conversation.thoughts() == sum(len(tokenizer.encode(f"{text}\n")) for text in thoughts)


def test_without_thoughts_and_in_a_foreign_template(tokenizer):
    plain = [QUESTION, {"role": "assistant", "content": "Calm."}] * 3
    conversation = retold(tokenizer, plain, thinking=False)
    assert conversation.ids == encode_chat(tokenizer, plain, thinking=False).ids[:-1]
    assert not conversation.opened and conversation.messages == plain and conversation.thoughts() == 0

    other = foreign(tokenizer, FOREIGN)
    check_template(other)
    conversation = Conversation(other)
    for _ in range(3):
        conversation.hear([QUESTION])
        conversation.answer([*other.encode("Calm."), other.id_of("<|im_end|>")])
    chat = encode_chat(other, plain)
    assert conversation.ids == chat.ids[:-1]
    assert conversation.spans == [(start, stop + 1) for start, stop in chat.spans]  # the end is the model's own


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 511), max_size=12), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_whatever_the_model_says_stands_verbatim(tokenizer, answers, thinking, tools):
    conversation = Conversation(tokenizer, [WEATHER] if tools else (), thinking=thinking)
    told = []
    for tokens in answers:
        before = list(conversation.ids)
        conversation.hear([QUESTION])
        assert conversation.ids[: len(before)] == before
        start = len(conversation.ids)
        ends = [place for place, token in enumerate(tokens) if token in tokenizer.stop_ids]
        said = tokens[: ends[0] + 1] if ends else tokens  # an engine stops there
        message = conversation.answer(said)
        assert conversation.ids[start:] == said and conversation.spans[-1] == (start, start + len(said))
        assert message["role"] == "assistant" and message == conversation.messages[-1]
        told.append(said)
    assert [conversation.ids[start:stop] for start, stop in conversation.spans] == told


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|eos|>", None])
def test_every_answer_is_closed_once_whether_or_not_the_model_did(tokenizer, ending):
    conversation = Conversation(tokenizer)
    conversation.hear([QUESTION])
    conversation.answer(tokenizer.encode("hm") + ([tokenizer.id_of(ending)] if ending else []))
    conversation.hear([QUESTION])
    between = tokenizer.decode(conversation.ids[conversation.spans[0][0] :])
    closed = ending or "<|im_end|>"
    assert between == f"hm{closed}\n<|im_start|>user\nSea state?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert conversation.spans[0][1] - conversation.spans[0][0] == len(tokenizer.encode("hm")) + bool(ending)


def test_no_message_becomes_a_control_token(tokenizer):
    said = "".join(RESERVED)
    conversation = Conversation(tokenizer, [WEATHER])
    usual = Conversation(tokenizer, [WEATHER])
    for one, text in ((conversation, said), (usual, "calm")):
        one.hear([{"role": "user", "content": text}])
        one.answer([*tokenizer.encode("no"), tokenizer.id_of("<|im_end|>")])
        one.hear([{"role": "tool", "content": text}])
    controls = set(tokenizer.controls.values())
    assert [one for one in conversation.ids if one in controls] == [one for one in usual.ids if one in controls]
    assert tokenizer.decode(conversation.ids).count(said) == 2


def test_an_unfinished_call_is_told_as_it_stands(tokenizer):
    conversation = Conversation(tokenizer, [WEATHER], thinking=False)
    conversation.hear([QUESTION])
    call = "<tool_call>\n<function=weather>\n<parameter=place>\nKi"
    message = conversation.answer(tokenizer.encode(call, specials=True))
    assert message["tool_calls"][0]["function"]["arguments"] == '{"place": "Ki'
    conversation.hear([RESULT])  # and the talk can go on
    assert tokenizer.decode(conversation.ids).count("<tool_response>") == 1


def test_a_fork_goes_on_by_itself(tokenizer):
    conversation = Conversation(tokenizer)
    conversation.hear([QUESTION])
    twin = conversation.fork()
    twin.answer(tokenizer.encode("Calm."))
    assert conversation.due and not twin.due
    assert twin.ids != conversation.ids and conversation.spans == [] and len(conversation.messages) == 1
    assert conversation.answer(tokenizer.encode("Calm.")) == twin.messages[-1]


def test_examples_in_the_prompt_are_not_the_models_own(tokenizer):
    shots = [QUESTION, {"role": "assistant", "content": "Rough."}, QUESTION]
    conversation = Conversation(tokenizer, thinking=False)
    conversation.hear(shots)
    said = [*tokenizer.encode("Calm."), tokenizer.id_of("<|im_end|>")]
    conversation.answer(said)
    conversation.hear([QUESTION])
    assert len(conversation.spans) == 1
    whole = [*shots, {"role": "assistant", "content": "Calm."}, QUESTION]
    assert conversation.ids == encode_chat(tokenizer, whole, generation_prompt=True, thinking=False).ids


def test_turns_out_of_order_and_messages_without_roles_are_refused(tokenizer):
    conversation = Conversation(tokenizer)
    with pytest.raises(Refusal, match="nobody asked for"):
        conversation.answer([5])
    with pytest.raises(Refusal, match="without messages"):
        conversation.hear([])
    with pytest.raises(Refusal, match="role None"):
        conversation.hear([{"content": "?"}])
    conversation.hear([QUESTION])  # a refused turn has left nothing behind
    assert len(conversation.messages) == 1
    with pytest.raises(Refusal, match="while an answer is due"):
        conversation.hear([QUESTION])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        FOREIGN.replace("add_generation_prompt", "false"),
        FOREIGN.replace("assistant\n{% endif %}", "helper\n{% endif %}"),
    ],
)
def test_a_template_without_a_generation_prompt_is_refused(tokenizer, template):
    with pytest.raises(Refusal, match=r"generation|answers found"):
        check_template(foreign(tokenizer, template))
    check_template(tokenizer)
