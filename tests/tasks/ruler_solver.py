"""Answers to RULER's problems by somebody who sees the message alone, and reads it as a person would."""

import re
from collections import Counter


def solve(message: str) -> str:
    """The answer to any of the thirteen."""
    for sign, solver in (
        ("numbered list", common),
        ("coded text", frequent),
        ("Variables are assigned", traced),
        ("documents", asked),
        ("secret", hidden),
    ):
        if sign in message.split("\n")[0]:
            return ", ".join(solver(message))
    raise AssertionError(f"nobody knows what to do with {message[:80]!r}")


def hidden(message: str) -> list[str]:
    given: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the secret \w+ for (\S+) is: (\S+)\.", message):
        given.setdefault(key, []).append(value)
    query = re.findall(r"does the text above give for (.*)\? The secret", message)[-1]
    return [value for key in re.split(r", and |, ", query) for value in given[key]]


def traced(message: str) -> list[str]:
    """Of the last text: the one before is an example."""
    text = message[message.rindex("Variables are assigned") :]
    wanted = re.findall(r"which variables have the value (\d+)", text)[-1]
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        values[name] = values.get(source, source)
    return [name for name, value in values.items() if value == wanted]


def common(message: str) -> list[str]:
    text = message[message.rindex("numbered list") :]
    return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", text[: text.index("Question:")])).most_common(10)]


def frequent(message: str) -> list[str]:
    text = message[message.index("each coded word.") : message.index("Question:")]
    return [word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", text.split(".", 1)[1])).most_common(3)]


def asked(message: str) -> list[str]:
    ship = re.findall(r"the ([A-Z]\w+ [A-Z]\w+) (?:built|born)", message)[-1]
    [about] = re.findall(rf"^The {ship} is a ship.*$", message, re.MULTILINE)
    if "In which year" in message:
        return re.findall(r"built in (\d+)", about)
    [captain] = re.findall(r"captain for many years was (\w+ \w+)", about)
    return re.findall(rf"^{captain} was born in the town of (\w+)", message, re.MULTILINE)
