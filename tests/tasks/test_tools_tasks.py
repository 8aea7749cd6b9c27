"""Calls and the desk: played through, scored from messages alone, replies as the tools would give them."""

import json
from dataclasses import replace

import pytest

from trimaran.tasks.calls import Calls
from trimaran.tasks.desk import Desk
from trimaran.tasks.episode import Said, play
from trimaran.tasks.task import REWARD, Trace
from trimaran.tasks.toolbox import TOOLBOX, Made, made, message, parsed, same
from trimaran.text.answer import read_answer
from trimaran.text.template import render
from trimaran.text.tools import Tools

DESKS = [
    *({}, {"area": "accounts", "ask": True}, {"area": "calendar", "requests": 3, "ask": True}),
    {"requests": 3, "ask": True, "people": 2},
]


@pytest.mark.parametrize("settings", [{}, {"offered": 1, "form": "json"}, {"offered": len(TOOLBOX)}])
def test_calls_check_themselves(settings):
    Calls(**settings).check(64)


@pytest.mark.parametrize("form", ["native", "json"])
def test_an_integer_is_what_json_schema_calls_one(form):
    """63.0 is the integer 63; 63.5, "63" and, where 1 is wanted, true are not."""
    of = Calls(form=form)

    def whole(made):
        return [name for name, value in made["arguments"].items() if type(value) is int]

    for prompt in (one for one in map(of.prompt, range(40)) if whole(one.secret)):
        name = whole(prompt.secret)[0]
        value = prompt.secret["arguments"][name]
        for said, reward in ((float(value), 1), (value + 0.5, 0), (str(value), 0), (True, 0)):
            arguments = {**prompt.secret["arguments"], name: said}
            [gold] = of.gold(replace(prompt, secret={**prompt.secret, "arguments": arguments}))
            assert of.score(Trace(prompt, (gold,)))[REWARD] == reward, (name, said)
    assert same(1.0, 1) and not same(True, 1)


@pytest.mark.parametrize("settings", DESKS)
def test_desks_check_themselves(settings):
    Desk(**settings).check()


def spoken(of, prompt, message):
    """The message as a model would write it, read again as the engine reads what a model writes."""
    asked = [*prompt.messages]
    tools = Tools(prompt.tools)
    whole = render([*asked, message], tools=tools.definitions, generation_prompt=False, thinking=False)
    begun = render(asked, tools=tools.definitions, thinking=False)
    text = whole.removeprefix(begun).removesuffix("<|im_end|>\n")
    return read_answer(text, opened=False, tools=tools).message()


def test_perfect_calls_survive_the_template():
    """What the schema types, the template writes bare, and the reader types again: the same call."""
    for number in range(60):
        of = Calls(offered=3)
        prompt = of.prompt(number)
        said = spoken(of, prompt, of.gold(prompt)[0])
        assert len(said["tool_calls"]) == 1
        assert of.score(Trace(prompt, (said,)))[REWARD] == 1


@pytest.mark.parametrize("settings", DESKS)
def test_a_desk_played_by_its_own_gold(settings):
    """An episode led turn by turn gives the perfect trace, within the turns that runners allow."""
    desk = Desk(**settings)
    for number in range(30):
        prompt = desk.prompt(number)
        gold = desk.gold(prompt)
        answers = iter([one for one in gold if one["role"] == "assistant"])
        trace = play(desk, prompt, lambda history, _, answers=answers: Said(next(answers)))
        assert trace.messages == gold and trace.finish == "stop"
        assert desk.score(trace) == {REWARD: 1, "left": 1, "calls": desk.score(trace)["calls"], "refused": 0}


def test_a_desk_is_judged_by_how_it_is_left():
    desk = Desk(area="accounts", people=2)
    for number in range(20):
        prompt = desk.prompt(number)
        gold = desk.gold(prompt)
        accounts = prompt.secret["before"]["accounts"]
        one, other = accounts
        twice = message(
            [Made("transfer", {"source": a, "target": b, "amount": 1}) for a, b in ((one, other), (other, one))]
        )
        done = {"role": "assistant", "content": "Done."}

        def played(*said, prompt=prompt):
            answers = iter(said)
            return desk.score(play(desk, prompt, lambda *_: Said(next(answers))))

        steps = [said for said in gold if said["role"] == "assistant"]
        assert played(done)["left"] == 0
        if accounts[one] > 0 < accounts[other]:
            assert played(twice, *steps)[REWARD] == 1  # there and back again leaves the desk as it was
        more = message([Made("transfer", {"source": other, "target": one, "amount": 1})])
        scores = played(*steps[:-1], more, done)
        assert scores[REWARD] == 0 or scores["refused"] == 1
        overdrawn = message([Made("transfer", {"source": one, "target": other, "amount": 10_000})])
        scores = played(overdrawn, *steps)
        assert (scores[REWARD], scores["refused"]) == (1, 1)
        assert desk.score(Trace(prompt, gold, "turns"))[REWARD] == 0


def test_a_question_must_be_answered_by_the_number_alone():
    desk = Desk(ask=True, area="calendar")
    prompt = desk.prompt(0)
    *steps, last = desk.gold(prompt)
    for content, reward in ((last["content"], 1), (f"{last['content']} of them", 0), ("", 0), ("99", 0)):
        trace = Trace(prompt, (*steps, {"role": "assistant", "content": content}))
        assert desk.score(trace)[REWARD] == reward and desk.score(trace)["left"] == 1


def test_forged_replies_change_nothing():
    """The desk is worked out from the model's calls: tool messages are not believed, and nobody else may call."""
    desk = Desk()
    prompt = desk.prompt(1)
    said = tuple({**one, "role": "user"} if one["role"] == "assistant" else one for one in desk.gold(prompt)[:-1])
    assert desk.score(Trace(prompt, (*said, {"role": "assistant", "content": "Done."})))["left"] == 0


def test_money_is_neither_made_nor_lost():
    """A transfer is done where there is an amount to move, and refused, with nothing changed, everywhere else."""
    desk, done, refused = Desk(area="accounts"), 0, 0
    for number in range(20):
        prompt = desk.prompt(number)
        before = prompt.secret["before"]["accounts"]
        source, target, *_ = before
        amounts = [before[source], 1, 0, -7, before[source] + 1, 10**40, 1.5, True, None, "1"]
        for given in [(source, target, amount) for amount in amounts] + [("Zoe", target, 1), (source, None, 1)]:
            transfer = Made("transfer", dict(zip(("source", "target", "amount"), given)))
            turn = message([transfer, *(Made("balance", {"name": name}) for name in before)])
            answer, *balances = [json.loads(reply["content"]) for reply in desk.turn(prompt, [turn])]
            after = {name: balance["balance"] for name, balance in zip(before, balances)}
            amount = given[2] if "done" in answer else 0
            done, refused = done + ("done" in answer), refused + ("error" in answer)
            assert amount in (0, 1, before[source]) and amount is not True
            assert after == before | {source: before[source] - amount, target: before[target] + amount}
    assert done >= 20 and refused >= 10 * 20


def test_equality_is_of_types_too():
    assert same({"a": [1, "x"]}, {"a": [1.0, "x"]}) and same(None, None)
    for one, other in (
        (True, 1),
        (0, False),
        ("1", 1),
        ([1], [1, 2]),
        ({"a": 1}, {"a": 1, "b": 1}),
        (None, 0),
        ([], {}),
    ):
        assert not same(one, other) and not same([one], [other])


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "NaN", "{", "[" * 100_000, "1" * 5_000, "", "Infinity"])
def test_what_is_not_json(text):
    assert parsed(text) is None
    assert made({"function": {"name": "light", "arguments": text}}) is None
