"""L0-Bench: traces against CPython's own, marks against every single wrong step, programs in their bins."""

import ast
import os
import re
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.errors import Refusal
from trimaran.tasks import l0_trace
from trimaran.tasks.draw import split_of
from trimaran.tasks.l0 import BINS, L0, thresholds
from trimaran.tasks.l0_grade import cleaned, right_steps
from trimaran.tasks.l0_grammar import Shape, inputs, program
from trimaran.tasks.l0_trace import Crashed, trace_of
from trimaran.tasks.names import task
from trimaran.tasks.task import REWARD, Trace

SHAPES = [Shape(loop=20), Shape(lines=(5, 20), depth=2, loop=10), Shape(lines=(12, 60), depth=3, loop=8, lists=(1, 3))]
SETTINGS = [
    *({"steps": steps} for steps in BINS),
    {"steps": None, "demonstrations": 1},
    *({"steps": 13, "demonstrations": 0, "wording": wording} for wording in (1, 2, 3)),
    *({"steps": 13, "demonstrations": 2, "of": of} for of in ("other", "hidden")),
    {"steps": 10, "depth": 0, "lines": (5, 15), "lists": (1, 2), "numbers": 2, "demonstrations": 1, "thinking": False},
]


def cpython(source, values):
    """The trace by `sys.settrace`: which lines Python says it runs, and what their variable is at the next event. None
    where the program crashes."""
    space, events = {}, []
    exec(compile(source, "<generated>", "exec"), {}, space)
    values = {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    def tracer(frame, event, _):
        if event in ("line", "return"):
            shown = {name: str(value).replace(" ", "") for name, value in frame.f_locals.items()}
            events.append((event, frame.f_lineno, shown))
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        space["function"](**values)
    except (UnboundLocalError, IndexError):
        return None
    finally:
        sys.settrace(before)
    written = source.split("\n")
    trace = []
    for (_, line, _), (_, _, after) in pairwise(events):
        changed = re.match(r"\s*(\w+)(?: = |\.)", written[line - 1])
        trace.append(f"L{line},{changed[1]}:{after[changed[1]]}" if changed else f"L{line},")
    return trace


def ours(source, values):
    try:
        return [str(step) for step in trace_of(source, values, 10**6)]
    except Crashed:
        return None


def test_traces_are_cpythons_on_2000_programs():
    random, compared, sound = Random(7), 0, 0
    while compared < 2000:
        shape = SHAPES[compared % len(SHAPES)]
        made = program(random, shape)
        if made is None:
            continue
        values = inputs(random, made.parameters, shape)
        before = repr(values)
        mine, theirs = ours(made.source, values), cpython(made.source, values)
        assert mine == theirs, f"{made.source}\n{values}"
        assert repr(values) == before  # the caller's lists stay as they are
        compared, sound = compared + 1, sound + (theirs is not None)
    assert 500 < sound < 1900  # both kinds were compared: programs that end, and programs that crash


def test_programs_are_within_their_shape():
    random, depths, kinds = Random(1), set(), set()
    for _ in range(1000):
        shape = SHAPES[random.randrange(3)]
        made = program(random, shape)
        if made is None:
            continue
        assert shape.lines[0] < made.source.count("\n") + 1 < shape.lines[1]
        tree = ast.parse(made.source)
        assert ast.unparse(tree) == made.source
        assert [argument.arg for argument in tree.body[0].args.args] == list(made.parameters)
        kinds |= {type(node).__name__ for node in ast.walk(tree)}
        depth = max(len(line) - len(line.lstrip()) for line in made.source.split("\n")) // 4 - 1
        assert depth <= shape.depth
        depths.add(depth)
        for name, value in inputs(random, made.parameters, shape).items():
            assert name in made.parameters
            assert not isinstance(value, list) or shape.lists[0] <= len(value) <= shape.lists[1]
    assert depths >= {1, 2, 3}
    assert {"If", "While", "Assign", "Expr", "Subscript", "BinOp", "Compare", "Sub", "Add", "Eq", "NotEq"} <= kinds


def test_loops_within_loops_do_not_share_their_condition():
    random, nested = Random(2), 0
    for _ in range(800):
        made = program(random, SHAPES[2])
        for node in ast.walk(ast.parse(made.source)) if made else ():
            if isinstance(node, ast.While):
                assert ast.unparse(node.body[-2]).startswith("cnter_")
                assert ast.unparse(node.body[-1]).startswith(f"{node.test.id} = cnter_")
                inner = [one.test.id for one in ast.walk(node) if isinstance(one, ast.While) and one is not node]
                assert node.test.id not in inner
                nested += bool(inner)
    assert nested > 5


@pytest.mark.parametrize("source", [
    "def function(x):\n    import os", "def function(x):\n    x = open(x)", "def function(x):\n    x = x.real",
    "def function(x):\n    for y in x:\n        return", "def function(x):\n    return x", "x = 1",
    "def function(x):\n    x.clear()", "def function(x):\n    x.append(1, 2)", "def function(x):\n    x = 'a'",
    "def function(x):\n    if x:\n        x = 1\n    else:\n        x = 2", "def function(x):\n    x = x * 2",
    "def function(x):\n    x = 1 < x", "def function(x):\n    x = x[0:1]", "def function(x):\n    y = x + 1",
])  # fmt: skip
def test_other_programs_are_refused_unrun(source):
    with pytest.raises(Refusal, match="in a program"):
        trace_of(source, {"x": [1, 2]}, 10)


def test_a_trace_that_is_too_long_is_none_and_one_that_fits_is_whole():
    source = "def function(lst_x):\n    cnter_0 = 0\n    cond_a = cnter_0 != 4\n    while cond_a:\n        lst_x.pop()"
    source += "\n        cnter_0 = cnter_0 + 2\n        cond_a = cnter_0 != 4\n    return"
    found = list(map(str, trace_of(source, {"lst_x": [1, 2, 3]}, 12)))
    assert found == ["L2,cnter_0:0", "L3,cond_a:True", "L4,", "L5,lst_x:[1,2]", "L6,cnter_0:2", "L7,cond_a:True",
                     "L4,", "L5,lst_x:[1]", "L6,cnter_0:4", "L7,cond_a:False", "L4,", "L8,"]  # fmt: skip
    assert trace_of(source, {"lst_x": [1, 2, 3]}, 11) is None
    with pytest.raises(Crashed):
        trace_of(source, {"lst_x": [1]}, 12)


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_tasks_check_themselves(settings):
    task("l0", settings).check(2)


@pytest.mark.parametrize("steps", BINS)
def test_published_bins(steps):
    l0 = L0(steps=steps)
    counts = [len(l0.prompt(number, "held_out").secret["trace"]) for number in range(25)]
    room = max(2, 0.15 * steps)
    assert all(abs(count - steps) <= room for count in counts) and len(set(counts)) > 3
    assert abs(statistics.mean(counts) - steps) <= room / 2


def answered(prompt, lines):
    return L0().score(Trace(prompt, ({"role": "assistant", "content": "\n".join(lines)},)))


def mutations(step, lines, place):
    """Ways in which step `place` alone goes wrong; what stands in its stead."""
    number, _, changed = step.partition(",")
    yield "left out", []
    yield "another line", [f"L{int(number[1:]) + 1},{changed}"]
    yield "a digit more", [f"{number}0,{changed}"]
    if place + 1 < len(lines):  # what comes after the last step does not count
        yield "twice", [step, step]
    if place:  # nor what comes before the first
        yield "one too many", ["L1,", step]
    if changed:
        name, _, value = changed.partition(":")
        yield "another variable", [f"{number},{name}x:{value}"]
        yield "no value", [f"{number},"]
        yield "no name", [f"{number},{value}"]
        yield "a sign more", [f"{number},{changed}0"]
        yield "a sign less", [f"{number},{changed[:-1]}"]
        yield "another value", [f"{number},{name}:{'False' if value == 'True' else 'True'}"]
        if value.startswith("["):
            yield "another order", [f"{number},{name}:[9,{value[1:]}"]


@pytest.mark.parametrize("settings", [{"steps": steps} for steps in BINS] + [{"steps": 40, "depth": 3}], ids=repr)
def test_the_gold_trace_is_right_and_every_single_change_is_wrong(settings):
    l0 = L0(**settings)
    for number in range(2 if l0.steps > 100 else 6):
        prompt = l0.prompt(number)
        lines, tried = prompt.secret["trace"], set()
        assert answered(prompt, lines) == {
            REWARD: 1, "steps_to_error": len(lines), "right": 1, "steps": len(lines)
        }  # fmt: skip
        for place, step in enumerate(lines):
            for kind, instead in mutations(step, lines, place):
                scores = answered(prompt, [*lines[:place], *instead, *lines[place + 1 :]])
                assert scores[REWARD] == 0, (kind, place, step)
                assert scores["steps_to_error"] == place + (kind == "twice"), (kind, place, step)
                tried.add(kind)
            if place + 1 < len(lines):
                swapped = [*lines[:place], lines[place + 1], step, *lines[place + 2 :]]
                assert answered(prompt, swapped)[REWARD] == 0
            assert answered(prompt, lines[:place])[REWARD] == 0
        assert len(tried) >= 10


@pytest.mark.parametrize(("answer", "right"), [
    ("L2,x:1\nL3,\nL4,lst_x:[1,2]", 3),
    ("```\nL2, x: 1\n L3,\n\nL4,lst_x: [1, 2]\n```\nDone.", 3),
    ("The trace is:\n```python\nL2,x:1\nL3,cond_a:True\nL4,lst_x:[1,2]", 3),  # of a control line, the number
    ("L2,x:1\nL3,\nL4,lst_x:[1,2]\nL5,y:3\nL6,", 3),
    ("L2,x:1\nL3,", 2),
    ("L2,x:1\nL3\nL4,lst_x:[1,2]", 1),
    ("L2,x:1\nL4,lst_x:[1,2]\nL3,", 1),
    ("L2,x:2\nL3,\nL4,lst_x:[1,2]", 0),
    ("L3,\nL4,lst_x:[1,2]", 0),
    ("L2,x:2\nL2,x:1\nL3,\nL4,lst_x:[1,2]", 0),  # the first is taken, whatever follows
    ("", 0),
    ("L22,x:1", 0),
])  # fmt: skip
def test_edge_cases_of_the_published_grader(answer, right):
    assert right_steps(answer, ["L2,x:1", "L3,", "L4,lst_x:[1,2]"]) == right


STEP = st.builds(
    lambda line, name, value: f"L{line},{name}:{value}" if name else f"L{line},",
    st.integers(3, 60),
    st.sampled_from(["", "x", "cond_a", "lst_x"]),
    st.sampled_from(["1", "-12", "True", "[1,2]", "[]"]),
)


@given(
    st.lists(STEP, max_size=20), st.text(), st.sampled_from(["", " ", "\t", " \r"]), st.text("abc[]\n,:", max_size=20)
)
def test_reading_answers(steps, before, space, after):
    lines = ["L2,x:1", *steps]
    spaced = "\n".join(line.replace(",", f"{space},{space}", 1) if line != lines[0] else line for line in lines)
    if "L2," not in before and not before.endswith(("L", "L2")):
        assert right_steps(f"{before}{spaced}\n{after}", lines) == len(lines)
    again = cleaned(spaced)
    assert again == "\n".join(lines) and cleaned(again) == again
    assert all(right_steps("\n".join(lines[:count]), lines) == count for count in range(1, len(lines)))


@given(st.text(), st.lists(STEP, min_size=1, max_size=5))
def test_any_answer_can_be_read(answer, lines):
    assert 0 <= right_steps(answer, ["L2,x:1", *lines]) <= len(lines) + 1


def test_a_cut_answer_keeps_what_it_said_and_thoughts_do_not_count():
    prompt = L0(steps=13).prompt(0)
    lines = prompt.secret["trace"]
    said = {"role": "assistant", "content": "\n".join(lines[:4]), "reasoning_content": "\n".join(lines)}
    scores = L0().score(Trace(prompt, (said,), finish="length"))
    assert (scores[REWARD], scores["steps_to_error"]) == (0, 4)


def test_the_number_of_demonstrations_does_not_change_the_problem():
    shown = {k: L0(steps=20, demonstrations=k).prompt(3, "held_out") for k in (0, 1, 2, 8)}
    assert len({repr(prompt.secret) for prompt in shown.values()}) == 1
    texts = [shown[k].messages[0]["content"] for k in (1, 2, 8)]
    assert [text.count("Output:") for text in texts] == [2, 3, 9]
    assert texts[0].count("Program:") == texts[2].count("Program:") == 1
    other = L0(steps=20, demonstrations=3, of="other").prompt(3, "held_out")
    text = other.messages[0]["content"]
    sources = re.findall(r"```\n(L1 .*?)\n```", text, re.DOTALL)
    bare = ["\n".join(line.partition(" ")[2] for line in source.split("\n")) for source in sources]
    assert [split_of(source) for source in bare] == ["train"] * 3 + ["held_out"]
    hidden = L0(steps=20, demonstrations=2, of="hidden").prompt(3, "held_out").messages[0]["content"]
    assert "def function" not in hidden and "def function" in text


def test_demonstrations_are_executions_of_the_program():
    l0 = L0(steps=30, demonstrations=6)
    for number in range(5):
        prompt = l0.prompt(number)
        text, calls = prompt.messages[0]["content"], set()
        for call, trace in re.findall(r"```\nfunction\((.*?)\)\n```\n\nOutput:\n```\n(.*?)\n```", text, re.DOTALL):
            values = eval(f"dict({call})")
            assert values != prompt.secret["inputs"]
            assert ours(prompt.secret["source"], values) == trace.split("\n")
            calls.add(call)
        assert len(calls) == 6


DRAWN = """
from trimaran.tasks.l0 import L0
print([L0(steps=steps, of=of).prompt(5, "held_out") for steps, of in ((13, "same"), (80, "other"))])
"""


def test_the_same_in_every_process():
    seen = {
        subprocess.run(
            [sys.executable, "-c", DRAWN], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(seen) == 1 and len(seen.pop()) > 5000


@pytest.mark.parametrize(("settings", "said"), [
    ({"lines": (20, 21)}, "lines"), ({"lines": (1, 20)}, "lines"), ({"lines": (10, 1000)}, "lines"),
    ({"lists": (5, 4)}, "lists"), ({"demonstrations": 0, "of": "hidden"}, "demonstrations"), ({"wording": 2}, "word"),
    ({"steps": 80, "depth": 0}, "depth"), ({"steps": 13, "lines": (80, 150)}, "at least 34"),
    ({"numbers": 1}, "numbers"), ({"loop": 4}, "loop"), ({"of": "mine"}, "other"),
])  # fmt: skip
def test_settings_that_cannot_be_met_are_refused(settings, said):
    with pytest.raises(Refusal, match=said):
        L0(**settings)


@pytest.mark.parametrize("settings", [
    {"steps": 250, "lines": (3, 6)}, {"steps": 1900, "loop": 6, "lines": (5, 20)},
], ids=repr)  # fmt: skip
def test_programs_that_are_too_rare_are_refused_and_not_sought_for_ever(settings):
    with pytest.raises(Refusal, match="no train problem among 10000 draws has steps"):
        L0(**settings).prompt(0)


def test_more_demonstrations_than_there_are_inputs_is_refused():
    l0 = L0(steps=10, lines=(3, 12), numbers=2, lists=(1, 1), demonstrations=64)
    with pytest.raises(Refusal, match="inputs that differ"):
        list(map(l0.prompt, range(5)))


def test_thresholds_of_the_published_sampling():
    assert thresholds(10, 300, 4) == [15, 127.5, 240]
    assert thresholds(20, 500, 2) == [30]
    assert thresholds(20, 500, 10)[0] == 30 and thresholds(20, 500, 10)[-1] == 400
    with pytest.raises(Refusal, match="bins"):
        thresholds(20, 500, 1)


def test_the_interpreter_runs_nothing():
    tree = ast.parse(Path(l0_trace.__file__).read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"exec", "eval", "compile", "getattr", "__import__"}
