r"""Boxes and what stands in them; GSM8K's files; math-verify as an oracle and as a verifier."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.errors import Refusal
from trimaran.tasks.gold import conversations
from trimaran.tasks.gsm8k import Gsm8k
from trimaran.tasks.maths import Maths, boxed, costly, equal, number
from trimaran.tasks.task import REWARD, Trace


@pytest.mark.parametrize(("text", "inside"), [
    ("\\boxed{5}", "5"),
    ("so \\boxed{\\frac{1}{2}}, done", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}"),
    ("first \\boxed{5}, again \\boxed{ 5. }", "5"),
    ("\\boxed{x^{2^{n}}}", "x^{2^{n}}"),
    ("\\boxed{5} or \\boxed{6}", None),
    ("\\boxed{5} or \\boxed{", None),
    ("\\boxed{}", None), ("\\boxed{ }", None), ("\\boxed{5", None), ("\\boxed{\\boxed{5}}", None), ("5", None),
    ("\\boxed{5}\\boxed{}", None), ("\\boxed5", None), ("boxed{5}", None), ("\\boxed{5\\}", None), ("", None),
])  # fmt: skip
def test_boxes(text, inside):
    assert boxed(text) == inside


@given(
    st.recursive(st.text("ab\\,+1 ", max_size=4), lambda inner: inner.map(lambda text: "{" + text + "}"), max_leaves=4)
)
def test_a_box_gives_back_what_is_put_in(text):
    safe = text.replace("\\", "")
    inside = boxed(f"say \\boxed{{{safe}}} now")
    assert inside is None or safe.replace(" ", "").rstrip(".").startswith(inside.replace(" ", "")[:1])
    assert (inside is None) == (not safe.strip())


@pytest.mark.parametrize(("text", "value"), [
    ("42", 42), ("-7", -7), ("+7", 7), ("1,234,567", 1234567), ("3.50", Fraction(7, 2)), ("007", 7), ("$18", 18),
    ("\\$18.00", 18), ("50\\%", 50), ("3/4", Fraction(3, 4)), ("-\\frac{3}{4}", Fraction(-3, 4)),
    ("\\dfrac{1}{3}", Fraction(1, 3)),
    ("1\\,234", 1234), ("12.", 12), ("12,34", None), ("1 2", None), ("1,2", None), ("1/0", None),
    ("", None), ("-", None),
    ("٤٢", None), ("\uff14\uff12", None), ("1e3", None), ("0x10", None), ("4_2", None), ("--1", None), ("1.2.3", None),
    ("9" * 1000, None), ("\\frac{1}{0}", None), ("five", None), ("½", None), ("²", None),
])  # fmt: skip
def test_numbers(text, value):
    assert number(text) == value


SMALL = st.fractions(min_value=-9999, max_value=9999, max_denominator=500)


@given(SMALL, SMALL, st.integers(1, 9))
def test_numbers_are_equal_as_fractions(one, other, factor):
    assert equal(str(one), str(other)) == (one == other)
    typeset = f"\\frac{{{abs(other.numerator) * factor}}}{{{other.denominator * factor}}}"
    assert equal(str(one), f"-{typeset}" if other < 0 else typeset) == (one == other)


@pytest.mark.parametrize(("right", "answer", "same"), [
    ("x+1", "x + 1", True), ("\\frac{a}{2}", "\\dfrac{a}{2}", True), ("(1,2)", "\\left(1, 2\\right)", True),
    ("x+1", "1+x", False), ("(1,2)", "(2,1)", False), ("5", "5 or 6", False), ("A", "B", False), ("x", "\u0445", False),
])  # fmt: skip
def test_text_is_compared_without_its_dress(right, answer, same):
    assert equal(right, answer) == same


@pytest.mark.parametrize("answer", [
    "9^{9^9}", "9^{9^{9}}", "9^9^9", "((9^{99})^{99})^{99}", "9^{999999}", "100!", "9**9**9", "1234567890123456",
    "2^{{9^9}}", "\\sum_{k=1}^{9} k", "9^ 999",
])  # fmt: skip
def test_answers_that_would_take_for_ever_are_seen(answer):
    assert costly(answer) and not equal("x^2+1", answer, "math-verify")


@pytest.mark.parametrize("answer", ["x^2+2x+1", "x^2y^3", "\\frac{x^{12}}{3}", "2\\sqrt{2}", "e^{2x}", "10^{12}"])
def test_answers_that_are_plain_are_not(answer):
    assert not costly(answer)


@pytest.mark.parametrize(("right", "answer", "same"), [
    ("x^2+2x+1", "(x+1)^2", True), ("\\sqrt{8}", "2\\sqrt{2}", True), ("\\{1,2\\}", "\\{2,1\\}", True),
    ("\\sqrt{8}", "\\sqrt{9}", False), ("(1,2)", "(2,1)", False), ("x+1", "x+1, x+2", False),
    ("\\pi", "\\{\\pi,e\\}", False),
])  # fmt: skip
def test_math_verify_judges_what_is_no_number(right, answer, same):
    pytest.importorskip("math_verify")
    assert equal(right, answer, "math-verify") == same


def test_math_verify_agrees_about_numbers():
    """The oracle for our own comparison: the same verdict on every pair of ways to write a few numbers."""
    math_verify = pytest.importorskip("math_verify")
    written = ["5", "5.0", "-5", "1/2", "\\frac{1}{2}", "0.5", "1234", "1,234", "2", "-\\frac{1}{2}"]
    parsed = {one: math_verify.parse(f"$\\boxed{{{one}}}$") for one in written}
    for one in written:
        for other in written:
            assert equal(one, other) == math_verify.verify(parsed[one], parsed[other]), (one, other)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gsm8k(tmp_path):
    def problem(n):
        answer = f"He has {n}*2=<<{n}*2={n * 2}>>{n * 2} eggs.\nHe sells them.\n#### {n * 2:,}"
        return {"question": f"A hen lays {n} eggs a day, for two days. How many?", "answer": answer}

    train = write(tmp_path / "train.jsonl", [problem(n) for n in range(500, 510)])
    return Gsm8k(train=train, held_out=write(tmp_path / "test.jsonl", [problem(n) for n in range(1, 6)]))


def test_gsm8k_from_its_files(gsm8k):
    gsm8k.check(12)
    prompt = gsm8k.prompt(0)
    [said] = gsm8k.gold(prompt)
    assert (
        said["reasoning_content"] == "He has 500*2=1000 eggs.\nHe sells them." and said["content"] == "\\boxed{1,000}"
    )
    for content, reward in (("It is \\boxed{1000}.", 1), ("\\boxed{\\$1000.00}", 1), ("1000", 0), ("\\boxed{100}", 0)):
        assert gsm8k.score(Trace(prompt, ({"role": "assistant", "content": content},)))[REWARD] == reward
    assert gsm8k.score(Trace(prompt, ({"role": "assistant", "content": prompt.messages[0]["content"]},)))["boxed"] == 0


def test_a_file_of_problems_ends_and_begins_anew(gsm8k):
    assert (gsm8k.size("train"), gsm8k.size("held_out")) == (10, 5)
    assert gsm8k.prompt(0).messages == gsm8k.prompt(10).messages != gsm8k.prompt(1).messages


def test_no_problem_is_demonstrated_twice(gsm8k):
    rows = list(conversations({"hens": (gsm8k, 10)}, seed=3))
    assert len({row["messages"][0]["content"] for row in rows}) == 10
    with pytest.raises(Refusal, match=r"^hens: count = 11 of 10 problems, .*; allowed: at most 10; next: "):
        conversations({"hens": (gsm8k, 11)})


@pytest.mark.parametrize(("line", "found"), [
    ("{", "line 2"), ("[]", "line 2"), ('{"question": "?"}', "line 2: no 'answer'"),
    ('{"question": "?", "answer": "5"}', "####"),
    ('{"question": "?", "answer": "#### five"}', "line 2"), ('{"question": 5, "answer": 6}', "line 2"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path, gsm8k, line, found):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(gsm8k.train.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(Refusal, match=found):
        Gsm8k(train=bad, held_out=gsm8k.held_out).prompt(0)


def test_only_line_ends_end_a_line(tmp_path, gsm8k):
    train = tmp_path / "train.jsonl"
    train.write_text('{"problem": "one\u2028two\x85three", "answer": 3}\r\n', encoding="utf-8", newline="")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"problem": "four", "answer": 4}')
    assert Maths(train=train, held_out=held_out).prompt(0).messages[0]["content"].startswith("one\u2028two\x85three")


def test_files_that_cannot_be_read(tmp_path, gsm8k):
    with pytest.raises(Refusal, match="no file"):
        Gsm8k(train=tmp_path / "none.jsonl", held_out=gsm8k.held_out).prompt(0)
    with pytest.raises(Refusal, match="is empty"):
        Gsm8k(train=write(tmp_path / "empty.jsonl", []), held_out=gsm8k.held_out).prompt(0)
    with pytest.raises(Refusal, match="also in"):
        Gsm8k(
            train=gsm8k.train,
            held_out=write(tmp_path / "same.jsonl", [json.loads(gsm8k.train.read_text().split("\n")[3])]),
        ).prompt(0)
    with pytest.raises(Refusal, match="train"):
        Maths(held_out=gsm8k.held_out)
