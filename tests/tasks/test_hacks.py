"""Answers that try to be paid without being right: none of them earns anything from any task.

Each family's own tricks stand beside the tricks for all of them; hypothesis adds what nobody thought of.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.tasks.names import task
from trimaran.tasks.task import REWARD, Trace

BOX = "\\boxed{}"
ROWS = [{"problem": f"What is {n} times 7?", "answer": str(7 * n)} for n in range(1, 40)]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Two files of maths problems."""
    folder = tmp_path_factory.mktemp("maths")
    for name, rows in (("train", ROWS[:20]), ("held_out", ROWS[20:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "held_out")}


TASKS = {
    "sums": ("arithmetic", {"digits": 2}),
    "differences": ("arithmetic", {"operations": "subtract", "distractors": 1}),
    "strings": ("transforms", {"thinking": True}),
    "lists": ("sorting", {}),
    "words": ("sorting", {"items": "words"}),
    "calls": ("calls", {"form": "native"}),
    "json": ("calls", {"form": "json", "offered": 3}),
    "desk": ("desk", {"requests": 2, "ask": True}),
    "maths": ("maths", {}),
}


def made(name, problems):
    family, fields = TASKS[name]
    return task(family, {**fields, **(problems if family == "maths" else {})})


def reward(of, prompt, **message):
    scores = of.score(Trace(prompt, ({"role": "assistant", "content": "", **message},)))
    return scores[REWARD]


def tricks(gold: str, prompt: str) -> list[str]:
    """What a model might try on any task whose answer is text."""
    shifted = str.maketrans("0123456789", "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669")
    wide = str.maketrans("0123456789", "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19")
    tricky = [
        *(BOX, "\\boxed{{}}", "\\boxed{{{", f"{BOX}{BOX}", "\\boxed{\\boxed{}}", "\\boxed{", "{" * 100_000),
        *(
            prompt,
            f"{prompt} {prompt}",
            f"{prompt}{gold}",
            f"{gold} {gold}",
            f"{gold}\n{gold}1",
            f"{gold} or 0",
            f"0 {gold}",
        ),
        *(
            f"<think>{gold}</think>",
            f"<think>{gold}",
            f"{gold}</think>",
            f"the answer is {gold}",
            f"{gold} is the answer",
        ),
        *(" ".join(map(str, range(1000))), "\n".join(map(str, range(-500, 500))), "9" * 100_000, "1e999", "nan", "inf"),
        *(gold.translate(shifted), gold.translate(wide), f"{gold}\u200b", f"\u200b{gold}", f"+{gold}", f"0{gold}"),
        *(f"{gold}.0", f"{gold}e0", f"'{gold}'", f"**{gold}**", f"<tool_call>{gold}</tool_call>", "\x00", "\ud83d"),
    ]
    return [text for text in tricky if text.strip() != gold]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("number", range(6))
def test_tricks_earn_nothing(name, number, problems):
    of = made(name, problems)
    prompt = of.prompt(number)
    gold = Trace(prompt, of.gold(prompt)).answer
    for text in tricks(gold, prompt.messages[0]["content"]):
        if name == "maths" and "\\boxed{" + prompt.secret["answer"] + "}" in text:
            continue  # prose round a box is allowed there; test_boxes has its tricks
        assert reward(of, prompt, content=text) == 0, text[:80]
        assert reward(of, prompt, content="", reasoning_content=f"{text} {gold}") == 0


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40), number=st.integers(0, 1000))
def test_no_other_text_earns_anything(name, problems, text, number):
    of = made(name, problems)
    prompt = of.prompt(number)
    final = Trace(prompt, of.gold(prompt)).final
    if text.strip() != final:
        assert reward(of, prompt, content=text) == 0


@pytest.mark.parametrize("name", ["sums", "strings", "lists"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_answer_changed_anywhere_earns_nothing(name, problems, data):
    of = made(name, problems)
    prompt = of.prompt(data.draw(st.integers(0, 1000)))
    gold = of.gold(prompt)[0]["content"]
    at, put = data.draw(st.integers(0, len(gold))), data.draw(st.text(max_size=2))
    changed = gold[:at] + put + gold[at + data.draw(st.integers(0, 2)) :]
    assert reward(of, prompt, content=changed) == float(changed.strip() == gold)


def test_a_call_counts_once_whole_and_outside_thoughts(problems):
    of = made("calls", problems)
    for number in range(40):
        prompt = of.prompt(number)
        [right] = of.gold(prompt)[0]["tool_calls"]
        name, arguments = right["function"]["name"], json.loads(right["function"]["arguments"])
        written = f"<tool_call>\n<function={name}>\n</function>\n</tool_call>"
        assert reward(of, prompt, tool_calls=[right]) == 1
        assert reward(of, prompt, tool_calls=[right], content="Here you are.") == 1
        assert reward(of, prompt, tool_calls=[right, right]) == 0
        assert reward(of, prompt, tool_calls=[right], content=written) == 0
        assert reward(of, prompt, reasoning_content=written, content="") == 0
        assert reward(of, prompt, content=json.dumps({name: arguments})) == 0
        for other in changed_arguments(arguments):
            assert reward(of, prompt, tool_calls=[call(name, other)]) == 0, other
        for offered in ("timer", "light", "rm", "", name.upper()):
            if offered != name:
                assert reward(of, prompt, tool_calls=[call(offered, json.dumps(arguments))]) == 0


def call(name, arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def changed_arguments(right):
    """JSON that is not the right arguments: cut off, with a key twice, of other types, with more and fewer keys."""
    text, first = json.dumps(right), next(iter(right))
    twice = f"{text[:-1]}, {json.dumps(first)}: {json.dumps(right[first])}}}"
    yield from (text[:-1], "", "null", "[]", "{}", "1", f"[{text}]", text * 2, twice, "{" * 50_000, "[" * 5_000)
    yield json.dumps({**right, "more": 1})
    yield json.dumps({first: [right[first]]} | {key: right[key] for key in list(right)[1:]})
    yield json.dumps({key: True if isinstance(value, int) else str(value) + " " for key, value in right.items()})
    yield json.dumps({first: float("nan")})
    if any(isinstance(value, int) and not isinstance(value, bool) for value in right.values()):
        yield json.dumps({key: str(value) if isinstance(value, int) else value for key, value in right.items()})


@settings(max_examples=80, deadline=None)
@given(
    arguments=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    text=st.text(max_size=30),
    number=st.integers(0, 50),
)
def test_no_other_arguments_earn_anything(arguments, text, number):
    of = task("calls")
    prompt = of.prompt(number)
    name = prompt.secret["name"]
    for written in (json.dumps(arguments), text, arguments):
        assert reward(of, prompt, tool_calls=[call(name, written)]) == 0
    desk = task("desk")
    shown = desk.prompt(number)
    for tool in shown.tools:
        said = {"role": "assistant", "content": "", "tool_calls": [call(tool["function"]["name"], text)]}
        [reply] = desk.turn(shown, (said,))
        assert "error" in json.loads(reply["content"])
