import itertools
import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimaran.text.answer import AnswerReader, CallArguments, CallStart, ContentText, ReasoningText, read_answer
from trimaran.text.template import render
from trimaran.text.tools import Tools

PROPERTIES = {
    "place": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "where": {"type": "object"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
TOOLS = Tools(
    [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}},
        },
        {"name": "now"},
    ]
)
CALL = "<tool_call>\n<function=weather>\n<parameter=place>\nKiel\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
CALL += "</function>\n</tool_call>"
KIEL = ("weather", '{"place": "Kiel", "days": 2}', True)
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


def said(text, opened=False, tools=TOOLS, **options):
    """(reasoning, content, calls) of a text."""
    answer = read_answer(text, opened, tools, **options)
    return answer.reasoning, answer.content, [(call.name, call.arguments, call.complete) for call in answer.calls]


def test_thoughts():
    assert said("It is.\n</think>\nYes.", opened=True) == ("It is.", "Yes.", [])
    assert said("\nIt is.\n\n</think>\n\n  Yes.\n", opened=True) == ("It is.", "  Yes.\n", [])
    assert said("<think>\nIt is.\n</think>\nYes.", opened=True) == ("It is.", "Yes.", []), "the tag repeated"
    assert said(" <think>It is.</think>Yes.") == ("It is.", "Yes.", []), "thought although it was not asked to"
    assert said("</think>\n\nYes.", opened=True) == ("", "Yes.", []), "a budget of no thought at all"
    assert said("a <think> b </think>c</think>d", opened=True) == ("a <think> b ", "c</think>d", [])


def test_a_thought_without_an_end_or_a_beginning():
    assert said("It is. <think", opened=True) == ("It is. <think", "", [])
    assert said("It is.\n</thi", opened=True) == ("It is.\n</thi", "", [])
    assert said("<think>It is.") == ("It is.", "", [])
    assert said("Yes.\n") == ("", "Yes.\n", []), "no tag: no thought, though others take all for one"
    assert said("") == said("", opened=True) == ("", "", [])


def test_content_can_be_forced():
    assert said("It is.", opened=True, force_nonempty_content=True) == ("It is.", "It is.", [])
    assert said("It is.</think>Yes.", opened=True, force_nonempty_content=True) == ("It is.", "Yes.", [])
    assert said("It is.</think>" + CALL, opened=True, force_nonempty_content=True) == ("It is.", "", [KIEL])


def test_an_orphan_is_taken_out_and_pairs_are_not():
    assert said("</think>\n\nYes.") == said("\n</think>\nYes.") == ("", "Yes.", [])
    assert said("It is. </think>Yes.") == ("", "It is. Yes.", [])
    assert said("It is.\n</think>\n\nYes. </think>") == ("", "It is.\n\n\nYes. </think>", [])
    assert said("Write <think>hm</think> first.") == ("", "Write <think>hm</think> first.", [])


def test_calls():
    assert said(CALL) == ("", "", [KIEL])
    assert said(f"Look it up.\n</think>\n{CALL}\n", opened=True) == ("Look it up.", "", [KIEL])
    assert said(f"I shall look.\n\n{CALL}\n{NOW}\nDone. ") == ("", "I shall look.Done. ", [KIEL, ("now", "{}", True)])
    assert said(f"{CALL}{CALL}")[2] == [KIEL, KIEL]
    assert said(NOW.replace("now", "sail"))[2] == [("sail", "{}", True)], "a function that nobody offered"
    assert said(CALL, tools=None) == ("", CALL, []), "nobody offered any"
    assert said(f"{CALL} hm", opened=True) == (f"{CALL} hm", "", []), "a thought calls nothing"


def test_ids_and_places_are_those_of_the_calls():
    reader = AnswerReader(False, TOOLS)
    starts = [delta for delta in [*reader.push(CALL + NOW), *reader.finish()] if isinstance(delta, CallStart)]
    assert [(start.index, start.name) for start in starts] == [(0, "weather"), (1, "now")]
    assert len({start.id for start in starts}) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", s.id) for s in starts)
    assert [call.id for call in reader.answer.calls] == [start.id for start in starts]


def test_what_is_no_call_stays_content_letter_by_letter():
    for text in (
        "<tool_call>",
        "a \n<tool_call>\n",
        "<tool_call>\n<function=weather>\nKiel\n</function>\n</tool_call>\n",
        "<tool_call> <function=weather>\n<parameter=pl",
        "<tool_call>\nweather(Kiel)\n</tool_call>",
        "<tool_call>\n<function=>\n</function></tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {\n</tool_call> b',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>',
        f"<tool_call>{'[' * 100_000}</tool_call>",
        f'<tool_call>{{"name": {"[" * 100_000}</tool_call>',
        "<tool_call>\n<function=" + "x" * 300 + ">\n</function>\n</tool_call>",
    ):
        assert said(text) == ("", text, [])
    broken = "<tool_call>\n<function=weather>\n"
    assert said(f"{broken}{CALL}") == ("", broken.rstrip(), [KIEL]), "the next is read all the same"


def test_calls_as_older_families_write_them():
    text = '<tool_call>\n{"name": "weather", "arguments": {"place": "Kiel", "days": 2}}\n</tool_call>'
    assert said(f"Well.\n{text}\n{text}") == ("", "Well.", [KIEL, KIEL])
    assert said(text.removesuffix("</tool_call>"))[2] == [KIEL]
    assert said('<tool_call>{"name": "f", "parameters": "{}"}</tool_call>')[2] == [("f", "{}", True)]


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        (CALL[: CALL.index("el\n")], '{"place": "Ki'),
        (CALL[: CALL.index("</parameter>") + 5], '{"place": "Kiel\\n</par'),
        (CALL[: CALL.index("<parameter=days")], '{"place": "Kiel"'),
        (CALL[: CALL.index("2\n") + 1], '{"place": "Kiel", "days": 2'),
        (CALL[: CALL.index("</function>") + 5], '{"place": "Kiel", "days": 2'),
    ],
)
def test_a_call_that_was_cut_off_cannot_be_carried_out(cut, arguments):
    assert said(cut) == ("", "", [("weather", arguments, False)])
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_small_slips_of_a_call_are_forgiven():
    assert said(CALL.removesuffix("</tool_call>"))[2] == [KIEL]
    assert said(CALL.removesuffix("</tool_call>") + "So.") == ("", "So.", [KIEL])
    assert said(CALL.replace("</function>\n", ""))[2] == [KIEL]
    assert said(CALL.replace("2\n</parameter>\n", "2\n"))[2] == [KIEL]
    assert said(CALL.replace("\n", ""))[2] == said(CALL.replace("\n", "\n ").replace(" Kiel\n ", "Kiel\n"))[2] == [KIEL]


def test_a_string_is_handed_on_while_it_is_written():
    reader = AnswerReader(False, TOOLS)
    pieces = [reader.push(piece) for piece in ("<tool_call><function=weather>\n", "<parameter=place>", "\nKi", "\ne")]
    assert pieces[0] == [] and pieces[2:] == [[CallArguments(0, '"Ki')], [CallArguments(0, "\\ne")]]
    assert isinstance(pieces[1][0], CallStart) and pieces[1][1:] == [CallArguments(0, '{"place": ')]


def test_thinking_is_known_at_any_moment():
    reader = AnswerReader(True)
    assert reader.thinking
    assert reader.push("a</thi") == [ReasoningText("a")] and reader.thinking
    assert reader.push("nk>b") == [ContentText("b")] and not reader.thinking
    assert not AnswerReader(False).thinking


# Texts made of what the reader looks at and of pieces of it: anything, a thought, a value, what stands between calls.
def joined(*parts):
    return st.lists(st.sampled_from(parts), max_size=10).map("".join)


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=place>"]
TAGS += [
    "<parameter=days>",
    "</parameter>",
    CALL,
    NOW,
    '{"name": "now"}',
    "\n",
    " ",
    "a",
    "<",
    ">",
    "2",
    '"',
    "é🙂",
    "</",
]
IN_THOUGHT = joined("\n", "a", " ", "</think>", "</thi", "<think>", "<")
IN_VALUE = joined("\n", "a", "</parameter>", "</function>", "</tool_call>", "<parameter=x>", "</para", "<", "é")
BETWEEN = joined("\n", " ", "a", "</think>", "<think>", "<tool_call>", "</tool_call>", "<function=now>", "<tool", NOW)
OPENINGS = st.sampled_from([CALL[: CALL.index("Kiel")], CALL[: CALL.index("2\n")], CALL[: CALL.index("<para")], ""])
TEXTS = joined(*TAGS) | IN_THOUGHT | st.tuples(OPENINGS, IN_VALUE, BETWEEN).map("".join) | BETWEEN


@given(TEXTS, st.booleans(), st.sampled_from([TOOLS, None]), st.booleans(), st.data())
@settings(max_examples=800, deadline=None)
def test_however_a_text_is_cut_it_reads_the_same(text, opened, tools, force, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
    whole = together([text], opened, tools, force)
    assert together(pieces, opened, tools, force) == together(list(text), opened, tools, force) == whole


def together(pieces, opened, tools, force):
    """Deltas put together, held against the reader's own sum; no two of a kind in one push, none empty."""
    count = itertools.count()
    reader = AnswerReader(opened, tools, force_nonempty_content=force, new_id=lambda: f"id{next(count)}")
    reasoning, content, calls = "", "", []
    for deltas in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        assert all(isinstance(delta, CallStart) or delta.text for delta in deltas)
        for delta in deltas:
            if isinstance(delta, ReasoningText):
                assert not calls and (not content), "thought comes first"
                reasoning += delta.text
            elif isinstance(delta, ContentText):
                content += delta.text
            elif isinstance(delta, CallStart):
                assert delta.index == len(calls)
                calls.append([delta.id, delta.name, ""])
            else:
                assert delta.index == len(calls) - 1
                calls[-1][2] += delta.text
    answer = reader.answer
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert [[call.id, call.name, call.arguments] for call in answer.calls] == calls
    for call in answer.calls:
        assert is_table(call.arguments) == call.complete
    return answer


def is_table(source):
    try:
        return isinstance(json.loads(source), dict)
    except json.JSONDecodeError:
        return False


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost(text):
    """Without calls, think tags and the line ends beside them are all that goes."""
    answer = read_answer(text, True, None)
    bare = text.lstrip(" \n").removeprefix("<think>") if text.lstrip(" \n").startswith("<think>") else text
    thought, tag, rest = bare.partition("</think>")
    assert answer.content == rest.lstrip("\n")
    if bare.lstrip(" \n").startswith("</think>"):
        assert answer.reasoning == "" or bare is not text
    else:
        assert answer.reasoning == (thought.lstrip("\n").rstrip("\n") if tag else thought.lstrip("\n"))


# What the template writes is what is read.
END = re.compile(r"</parameter>(?=\s*<(?:/function|/tool_call|parameter=[^<>\n]+)>)|</function>(?=\s*</tool_call>)")
WORDS = st.text(st.sampled_from("ab <>/\n\"'{}=é🙂") | st.characters(exclude_categories=["Cs"]), max_size=12)
SPELT = WORDS | IN_VALUE
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner)
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "place": SPELT,
        "days": st.integers(),
        "exact": st.booleans(),
        "where": st.dictionaries(WORDS, JSON, max_size=3),
        "note": st.none() | st.sampled_from(["", "calm\n", " 3 kn"]),
    },
)


@given(
    ARGUMENTS, st.sampled_from(["", "Aye.", "Aye,\naye"]), st.sampled_from(["", "Hm.", "Hm\n\nhm"]), st.integers(1, 3)
)
@settings(max_examples=150, deadline=None)
def test_what_the_template_writes_is_read_back(arguments, content, reasoning, calls):
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    assume(len(END.findall(written + "</function>")) == len(arguments))  # a value that spells its own end is lost
    function = {"name": "weather", "arguments": arguments}
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [{"type": "function", "function": function}] * calls
    question = {"role": "user", "content": "?"}
    text = render([question, message], tools=TOOLS.definitions, generation_prompt=False)
    prompt = render([question], tools=TOOLS.definitions, thinking=bool(reasoning))
    answer = read_answer(text.removeprefix(prompt).removesuffix("<|im_end|>\n"), bool(reasoning), TOOLS)
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert [json.loads(call.arguments) for call in answer.calls] == [arguments] * calls
    again = answer.message()
    assert render([question, again], tools=TOOLS.definitions, generation_prompt=False) == text
