"""A desk with accounts and a calendar, kept through tools over several turns; what counts is how it is left.

Nothing is kept between turns: what the desk holds is worked out anew from the calls in the messages.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace
from trimaran.tasks.toolbox import PEOPLE, Made, definition, made, message, same

DAYS = ("mon", "tue", "wed", "thu", "fri")
HOURS = range(9, 18)
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}

Held = dict[str, Any]  # accounts: name -> money; calendar: day -> hour, as text -> name

TOOLS = {
    "accounts": (
        definition("balance", {"name": TEXT}),
        definition("transfer", {"source": TEXT, "target": TEXT, "amount": NUMBER}),
    ),
    "calendar": (
        definition("day", {"day": TEXT}),
        definition("book", {"day": TEXT, "hour": NUMBER, "name": TEXT}),
        definition("cancel", {"day": TEXT, "hour": NUMBER}),
    ),
}


class Desk(Task):
    """Requests about who has how much money and who is booked when; some need a look before they can be carried out.

    area: what the desk is for. requests: in one prompt, in order. ask: a question follows, answered by a number.
    The reward is 1 where the episode ended by itself, the desk is left as it should be and the question is answered.
    """

    name: ClassVar[str] = "desk"
    area: Literal["accounts", "calendar", "both"] = "both"
    people: int = Field(4, ge=2, le=len(PEOPLE))
    requests: int = Field(1, ge=1, le=3)
    ask: bool = False

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        secret = drawn(self.name, number, split, self._make, lambda made: f"desk {made['words']}")
        messages = ({"role": "user", "content": " ".join(secret["words"])},)
        tools = tuple(tool for area in self._areas() for tool in TOOLS[area])
        return Prompt(self.name, split, number, messages, tools, secret, thinking=False)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        messages: list[Message] = []
        for calls in prompt.secret["calls"]:
            messages.append(message([Made(**call) for call in calls], len(messages)))
            messages += self.turn(prompt, messages)
        return (*messages, {"role": "assistant", "content": prompt.secret["answer"] or "Done."})

    def turn(self, prompt: Prompt, messages: Sequence[Message]) -> tuple[Message, ...]:
        """What the tools answer to the last message's calls, one message each."""
        held, _ = replayed(prompt, messages[:-1])
        calls = messages[-1].get("tool_calls") or ()
        answers = [carried_out(held, call, prompt.tools) for call in calls]
        return tuple(
            {"role": "tool", "tool_call_id": str(call.get("id", "")), "content": json.dumps(answer)}
            for call, answer in zip(calls, answers)
        )

    def score(self, trace: Trace) -> dict[str, float]:
        """`reward`; `left`: the desk is as it should be; `calls` made, and those of them that were `refused`."""
        held, answers = replayed(trace.prompt, trace.messages)
        refused = sum("error" in answer for answer in answers)
        left, wanted = same(held, trace.prompt.secret["after"]), trace.prompt.secret["answer"]
        right = left and trace.final is not None and wanted in ("", trace.final)
        return {REWARD: float(right), "left": float(left), "calls": float(len(answers)), "refused": float(refused)}

    def _areas(self) -> Sequence[str]:
        return ("accounts", "calendar") if self.area == "both" else (self.area,)

    def _make(self, random: Random) -> dict[str, Any] | None:
        """A desk, requests, the calls that carry them out, and what is left; None where a request cannot be made."""
        people = random.sample(PEOPLE, self.people)
        before: Held = {
            "accounts": {name: random.randint(1, 99) for name in people},
            "calendar": {day: {} for day in DAYS},
        }
        for name in people:
            before["calendar"][random.choice(DAYS)][str(random.choice(HOURS))] = name
        after, words, calls = copy.deepcopy(before), [], []
        for _ in range(self.requests):
            request = random.choice([kind for area in self._areas() for kind in REQUESTS[area]])
            said, steps = request(random, after, people)
            answers = [carry_out(after, step) for calls_at_once in steps for step in calls_at_once]
            if any("error" in answer for answer in answers):
                return None
            words.append(said)
            calls += [[{"name": step.name, "arguments": step.arguments} for step in at_once] for at_once in steps]
        if same(before, after):
            return None  # whoever does nothing would be right
        answer = self._question(random, after, people, words, calls) if self.ask else ""
        return {"words": words, "before": before, "after": after, "calls": calls, "answer": answer}

    def _question(self, random: Random, after: Held, people: list[str], words: list[str], calls: list[Any]) -> str:
        """Adds a question about the desk as it is left; returns its answer."""
        if self.area == "calendar":
            day = random.choice(DAYS)
            words.append(f"How many are booked on {day} then?")
            calls.append([{"name": "day", "arguments": {"day": day}}])
            return str(len(after["calendar"][day]))
        name = random.choice(people)
        words.append(f"How much has {name} then?")
        calls.append([{"name": "balance", "arguments": {"name": name}}])
        return str(after["accounts"][name])


# what people ask for: (words, calls), calls that may be made at once side by side

Steps = list[list[Made]]


def pay(random: Random, held: Held, people: list[str]) -> tuple[str, Steps]:
    """A transfer that says all there is to know."""
    source, target = random.sample(people, 2)
    amount = random.randint(1, max(1, held["accounts"][source]))
    call = Made("transfer", {"source": source, "target": target, "amount": amount})
    return f"Move {amount} from {source} to {target}.", [[call]]


def empty(random: Random, held: Held, people: list[str]) -> tuple[str, Steps]:
    """A transfer of an amount that has to be looked up."""
    source, target = random.sample(people, 2)
    amount = held["accounts"][source]
    call = Made("transfer", {"source": source, "target": target, "amount": amount})
    return f"Move all that {source} has to {target}.", [[Made("balance", {"name": source})], [call]]


def book(random: Random, held: Held, people: list[str]) -> tuple[str, Steps]:
    """A new booking."""
    day, hour, name = random.choice(DAYS), random.choice(HOURS), random.choice(people)
    return f"Book {name} on {day} at {hour}.", [[Made("book", {"day": day, "hour": hour, "name": name})]]


def shift(random: Random, held: Held, people: list[str]) -> tuple[str, Steps]:
    """A booking moved to another day at its hour, which has to be looked up."""
    day, other = random.sample(DAYS, 2)
    names = list(held["calendar"][day].values())
    at = {name: int(hour) for hour, name in held["calendar"][day].items() if names.count(name) == 1}
    name = random.choice(sorted(at)) if at else people[0]
    hour = at.get(name, HOURS[0])
    moved = [Made("cancel", {"day": day, "hour": hour}), Made("book", {"day": other, "hour": hour, "name": name})]
    return f"Shift {name} from {day} to {other}, same hour.", [[Made("day", {"day": day})], moved]


REQUESTS = {"accounts": (pay, empty), "calendar": (book, shift)}


# carrying out calls


def replayed(prompt: Prompt, messages: Sequence[Message]) -> tuple[Held, list[dict[str, Any]]]:
    """What the desk holds after `messages`, and what each call in them was answered."""
    held: Held = copy.deepcopy(prompt.secret["before"])
    said = [one for one in messages if one["role"] == "assistant"]
    return held, [carried_out(held, call, prompt.tools) for one in said for call in one.get("tool_calls") or ()]


def carried_out(held: Held, call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Carries out a call as the model wrote it, if it is one of the tools' and has their arguments and types."""
    wanted, read = (
        {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools},
        made(call),
    )
    if read is None or read.name not in wanted:
        return {"error": "no such tool, or no JSON"}
    parameters = wanted[read.name]
    if read.arguments.keys() != parameters.keys():
        return {"error": f"arguments are {', '.join(parameters)}"}
    for name, schema in parameters.items():
        if type(read.arguments[name]) is not (str if schema == TEXT else int):
            return {"error": f"{name} is no {schema['type']}"}
    return carry_out(held, read)


def carry_out(held: Held, call: Made) -> dict[str, Any]:
    """Changes `held`, or leaves it as it is and says why."""
    given, accounts, calendar = call.arguments, held["accounts"], held["calendar"]
    if any(given[key] not in accounts for key in ("name", "source", "target") if key in given):
        return {"error": "no such person"}
    if "day" in given and given["day"] not in calendar:
        return {"error": f"days are {', '.join(DAYS)}"}
    if call.name == "balance":
        return {"balance": accounts[given["name"]]}
    if call.name == "transfer":
        return transferred(accounts, **given)
    return dict(calendar[given["day"]]) if call.name == "day" else booked(calendar[given["day"]], call)


def transferred(accounts: dict[str, int], source: str, target: str, amount: int) -> dict[str, Any]:
    """Money moved, if it is there."""
    if not 0 < amount <= accounts[source]:
        return {"error": f"{source} has {accounts[source]}"}
    accounts[source] -= amount
    accounts[target] += amount
    return {"done": True}


def booked(day: dict[str, str], call: Made) -> dict[str, Any]:
    """An hour of a day given away, or given back."""
    hour = str(call.arguments["hour"])
    free = hour not in day
    if call.arguments["hour"] not in HOURS or free != (call.name == "book"):
        return {"error": f"{hour} is {'free' if free else 'taken'}; hours are {HOURS[0]} to {HOURS[-1]}"}
    if free:
        day[hour] = call.arguments["name"]
    else:
        del day[hour]
    return {"done": True}
