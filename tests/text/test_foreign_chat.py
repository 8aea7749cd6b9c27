"""Templates in the manner of other families: golden strings, and what in them the assistant says."""

import pytest

from trimaran.text.chat import answer_prompts, encode_chat
from trimaran.text.tokenizer import Tokenizer

SIGNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")

HEADERS = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# An empty pair of think tags with line ends in it stands for "off"; only the last answer keeps its thought.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

BRACKETS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

ASK, SAY = {"role": "user", "content": "Sea state?"}, {"role": "assistant", "content": "Calm."}
THINK = {**SAY, "reasoning_content": "Look."}

CASES = {
    "headers": (
        HEADERS,
        [ASK, SAY, ASK, SAY],
        "<|bos|>"
        + 2
        * (
            "<|start_header_id|>user<|end_header_id|>\n\nSea state?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Calm.<|eot_id|>»"
        ),
    ),
    "chatml, off": (
        CHATML,
        [ASK, SAY, ASK, SAY],
        "<|im_start|>user\nSea state?<|im_end|>\n<|im_start|>assistant\n«Calm.<|im_end|>»\n"
        "<|im_start|>user\nSea state?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«Calm.<|im_end|>»\n",
    ),
    "chatml, thinking": (
        CHATML,
        [ASK, THINK],
        "<|im_start|>user\nSea state?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nLook.\n</think>\n\nCalm.<|im_end|>»\n",
    ),
    "brackets": (BRACKETS, [ASK, SAY, ASK, SAY], "<|bos|>" + 2 * "[INST] Sea state? [/INST]« Calm.<|eos|>»"),
}


@pytest.fixture(scope="module")
def foreign(tokenizer) -> Tokenizer:
    """The tokenizer with the control tokens of other families."""
    added = [{**tokenizer.document["added_tokens"][0], "content": sign, "id": tokenizer.vocab_size + place}
             for place, sign in enumerate(SIGNS)]  # fmt: skip
    document = {**tokenizer.document, "added_tokens": [*tokenizer.document["added_tokens"], *added]}
    return Tokenizer(document, tokenizer.config, tokenizer.template)


def bracketed(tokenizer, chat) -> str:
    """The text with « and » round what the assistant says."""
    text, at = "", 0
    for start, stop in chat.spans:
        text += tokenizer.decode(chat.ids[at:start]) + "«" + tokenizer.decode(chat.ids[start:stop]) + "»"
        at = stop
    return text + tokenizer.decode(chat.ids[at:])


@pytest.mark.parametrize("case", CASES)
def test_golden(foreign, case):
    template, messages, expected = CASES[case]
    assert bracketed(foreign, encode_chat(foreign, messages, template=template)) == expected


@pytest.mark.parametrize(("template", "ways"), [(HEADERS, 1), (CHATML, 2), (BRACKETS, 0)])
def test_how_answers_begin(foreign, template, ways):
    prompts = answer_prompts(Tokenizer(foreign.document, foreign.config, template))
    assert len(prompts) == ways and list(prompts) == sorted(prompts, key=len, reverse=True)


def test_transformers_marks_the_same_tokens(foreign, tmp_path):
    transformers = pytest.importorskip("transformers")
    foreign.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template, messages, _ = CASES["brackets"]
    found = theirs.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = encode_chat(foreign, messages, template=template)
    assert ours.ids == found["input_ids"]
    said = [place for start, stop in ours.spans for place in range(start, stop)]
    assert said == [place for place, mark in enumerate(found["assistant_masks"]) if mark]
