"""Answers of a given form: kept to token by token, with drafts and after a thought; what cannot be is refused."""

import builtins
import json
import re
from dataclasses import replace

import pytest
import torch

from tests.models import tiny
from trimaran.engine.budget import Thinking
from trimaran.engine.choose import Ask, choose
from trimaran.engine.constrain import Constraints
from trimaran.engine.guide import Guides
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.text.answer import read_answer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def constraints(tokenizer) -> Constraints:
    return Constraints(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, and more ids than the tokenizer has."""
    return tiny("latent", vocab_size=330)


def follow(guide, ids: list[int]) -> bool:
    """Whether the ids are allowed one after the other, and the text may end there."""
    for token in ids:
        if not guide.allowed()[token]:
            return False
        guide.push(token)
    return bool(guide.allowed()[2])  # eos


@pytest.mark.parametrize("spelling", [["é", "zz"], ["🙂x"], ['a"b\\c', "a"], ["line\nend"], ["\u2028"], ["tab\t/x/"]])
def test_choices_of_any_signs(constraints, tokenizer, spelling):
    guide = constraints.choice(spelling).guide()
    assert [follow(guide.fork(), tokenizer.encode(text)) for text in [*spelling, "b"]] == [True] * len(spelling) + [
        False
    ]


def test_the_forms(constraints, tokenizer):
    def fits(constraint, text):
        return follow(constraint.guide(), tokenizer.encode(text))

    person = constraints.schema(PERSON)
    assert fits(person, '{"name": "ab", "age": 7}') and fits(
        constraints.schema(json.dumps(PERSON)), '{"name":"","age":0}'
    )
    for wrong in (
        '{"name": "abcd", "age": 7}',
        '{"name": "a"}',
        '{"name": "a", "age": 100}',
        '{"name": "a", "age": 7}x',
    ):
        assert not fits(person, wrong)
    assert fits(constraints.json_object(), '{"a": [1, null, {"b": "ü"}]}') and not fits(
        constraints.json_object(), "[1]"
    )
    assert fits(constraints.regex("[ab]+c?"), "abac") and not fits(constraints.regex("[ab]+c?"), "abacc")
    lark = 'start: item+\nitem: "(" item* ")"'
    assert fits(constraints.grammar(lark), "(()())()") and not fits(constraints.grammar(lark), "(()")
    assert fits(constraints.grammar('root ::= "a" ("b" | "c")+'), "abcb")


def test_forks_do_not_notice_one_another(constraints, tokenizer):
    constraint = constraints.regex("ab|cd")
    guide = constraint.guide()
    a, b, c = (tokenizer.encode(sign)[0] for sign in "abc")
    ahead = guide.fork()
    ahead.push(a)
    assert ahead.allowed()[b] and not ahead.allowed()[c]
    assert guide.allowed()[[a, c]].all() and constraint.guide().allowed()[[a, c]].all()
    ahead.push(b)
    assert ahead.ended and not guide.ended
    assert ahead.allowed().nonzero()[:, 0].tolist() == sorted(tokenizer.stop_ids)


def test_a_token_out_of_form_is_told_by_the_next_question(constraints, tokenizer):
    guide = constraints.regex("a+").guide()
    guide.push(tokenizer.encode("b")[0])
    assert not guide.ended
    with pytest.raises(Refusal, match=r"^a regular expression that can not be kept to"):
        guide.allowed()


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_keep_to_their_forms_with_and_without_drafts(model, constraints, tokenizer, temperature, draft):
    """Different forms and none in one batch; the unconstrained row is not touched."""
    person, tiny_regex, choice = (
        constraints.schema(PERSON),
        constraints.regex("(ab|ba){2,4}"),
        constraints.choice(["the boat", "the boats", "a hull"]),
    )
    guides = [person.guide, tiny_regex.guide, choice.guide, None, lambda: person.guide(opened=True)]
    sampling = [Sampling(temperature=temperature, top_p=0.9, max_tokens=90, seed=i) for i in range(4)]
    sampling.append(sampling[0].replace(ignore_eos=True, stop_ids=tokenizer.stop_ids))
    guides[4] = lambda: Guides(Thinking(tokenizer, 6, opened=True), person.guide(opened=True))
    prompts = [[40 + i, 50, 60] for i in range(5)]
    outputs = generate(model, prompts, sampling, tokenizer=tokenizer, draft=draft, guides=guides)
    texts = [output.text for output in outputs]
    thought = read_answer(texts[4], opened=True)
    for text in (texts[0], thought.content):
        assert set(json.loads(text)) == {"name", "age"}
    assert re.fullmatch("(ab|ba){2,4}", texts[1]) and texts[2] in ("the boat", "the boats", "a hull")
    assert outputs[4].tokens[6] == tokenizer.id_of("</think>")
    assert all(output.finish == "eos" for output in outputs[:3])
    free = generate(model, prompts, sampling, tokenizer=tokenizer)
    assert outputs[3].tokens == free[3].tokens
    if draft:
        plain = generate(model, prompts, sampling, tokenizer=tokenizer, guides=guides)
        assert [output.tokens for output in outputs] == [output.tokens for output in plain]
        assert sum(output.drafted for output in outputs) > 0


def test_a_form_that_is_full_ends_the_row_without_an_end_token(model, constraints, tokenizer):
    outputs = generate(
        model, [[40]], Sampling(max_tokens=30, seed=1, ignore_eos=True), tokenizer=tokenizer,
        guides=[constraints.choice(["the boat"]).guide],
    )  # fmt: skip
    assert (outputs[0].text, outputs[0].finish, outputs[0].stop) == ("the boat", "eos", None)


def test_end_tokens_of_a_thought_with_rules_behind_it_are_not_said(constraints, tokenizer):
    guide = constraints.choice(["a"]).guide(opened=True)
    mask = guide.allowed()
    assert not mask[list(tokenizer.stop_ids)].any() and mask.sum() == tokenizer.vocab_size - len(tokenizer.stop_ids)


def nested(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = {
    "deep": ("schema", nested(20), "a schema of too many levels; allowed: at most 32; "),
    "deep source": ("schema", "[" * 5000 + "]" * 5000, "a schema that is no JSON (maximum recursion"),
    "no JSON": ("schema", "{", "a schema that is no JSON (Expecting"),
    "a list": ("schema", "[1]", "a schema that is [1]; allowed: a JSON object"),
    "large": ("schema", {"enum": ["x" * 70000]}, "a schema of 700"),
    "a type that is none": ("schema", {"type": "strnig"}, "a schema that can not be kept to (Invalid type: strnig)"),
    "a pattern that is none": (
        "schema",
        {"type": "string", "pattern": "(["},
        "a schema that can not be kept to (regex",
    ),
    "a keyword beyond it": ("schema", {"not": {}}, 'a schema that can not be kept to (Unimplemented keys: ["not"])'),
    "nothing fits": (
        "schema",
        {"type": "integer", "minimum": 5, "maximum": 3},
        "a schema that can not be kept to (Unsat",
    ),
    "itself": ("schema", {"$ref": "#"}, "a schema that can not be kept to ("),
    "a far reference": ("schema", {"$ref": "http://x.y/z"}, "a schema that can not be kept to (Resource"),
    "wide": (
        "schema",
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        "a schema that can not be kept to (Parser Error: Current row has",
    ),
    "unfolds": (
        "schema",
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "integer"}}} for j in range(6)]} for i in range(6)]},
        "a schema that can not be kept to (schema too large",
    ),
    "regex": ("regex", "((", "a regular expression that can not be kept to ("),
    "long regex": ("regex", "a" * 70000, "a regular expression of 70000 bytes; allowed: at most 65536; "),
    "surrogate": ("regex", "\ud800", "a regular expression with half a surrogate pair"),
    "grammar": ("grammar", "start: nothing", "a grammar that can not be kept to ("),
    "empty grammar": ("grammar", "", "a grammar that can not be kept to ("),
    "no choices": ("choice", [], "0 choices, 0 of them empty; allowed: 1 to 1024 that are not empty"),
    "empty choice": ("choice", ["a", ""], "2 choices, 1 of them empty; "),
    "many choices": ("choice", ["a"] * 2000, "2000 choices, 0 of them empty; allowed: 1 to 1024 "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(constraints, name):
    kind, given, said = REFUSED[name]
    with pytest.raises(Refusal) as refused:
        getattr(constraints, kind)(given)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_step_that_asks_too_much_ends_its_row_alone(constraints, tokenizer):
    """Some limits are met only on the way: the row is refused there and says why, its neighbour goes on."""
    guide = constraints.schema({"properties": {"a": REFUSED["wide"][1]}, "type": "object"}).guide()
    for token in tokenizer.encode('{"a": '):
        assert guide.allowed()[token]
        guide.push(token)
    logits, ask = torch.zeros(4, 330), Ask(Sampling(temperature=0), b"k", 0)
    brace = tokenizer.encode("{")[0]
    logits[:, brace] = 1
    first, second = choose(logits, [replace(ask, guide=guide, drafts=(brace,)), replace(ask, drafts=(brace,))])
    assert first.refusal.found.startswith("a schema that can not be kept to (Parser Error: Current row has")
    assert first.tokens == [brace] and second.tokens == [brace, brace], "what comes before the refusal stands"


def test_without_the_library_the_refusal_says_how_to_get_it(monkeypatch, tokenizer):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "llguidance":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refusal, match=r"pip install 'trimaran\[constrain\]'$"):
        Constraints(tokenizer)
