"""Small tasks for a model that knows nothing: what they score depends on each letter that it said."""

from typing import Any, ClassVar

from trimaran.tasks.task import GARBAGE, REWARD, Prompt, Task, Trace


class Talk(Task):
    """Asks again until it has had `answers`; the score is a digest of all that was said."""

    name = "talk"
    answers: int = 3
    thinking: bool = True

    def prompt(self, number: int, split: Any = "train") -> Prompt:
        question = {"role": "user", "content": f"boat {number}" + " hull" * (number % 5)}
        return Prompt(self.name, split, number, (question,), thinking=self.thinking)

    def gold(self, prompt):
        return ({"role": "assistant", "content": "hull"},)

    def turn(self, prompt, messages):
        said = sum(message["role"] == "assistant" for message in messages)
        return () if said >= self.answers else ({"role": "user", "content": f"and {said}?"},)

    def score(self, trace: Trace) -> dict[str, float]:
        said = "".join(str(message["content"]) for message in trace.messages)
        return {REWARD: sum(said.encode()) % 101 / 100, "answers": len(trace.messages)}


class Leaky(Talk):
    """Breaks at problem `at`, in the way of `how`."""

    name = "leaky"
    how: str = "score"
    at: int = 1

    def turn(self, prompt, messages):
        if self.how == "turn" and prompt.number == self.at:
            raise ZeroDivisionError("a hole below the waterline")
        if self.how == "reply" and prompt.number == self.at:
            return ({"content": "no role"},)
        if self.how == "interrupt" and prompt.number == self.at:
            raise KeyboardInterrupt
        return super().turn(prompt, messages)

    def score(self, trace):
        if trace.prompt.number == self.at:
            if self.how == "score":
                raise ZeroDivisionError("a hole below the waterline")
            if self.how == "nan":
                return {REWARD: float("nan")}
            if self.how == "endless":
                return {REWARD: 1.0, "other": float("inf")}
            if self.how == "none":
                return {"other": 1.0}
        return super().score(trace)


class Word(Task):
    """Asks for a word, and is content with that word alone."""

    name = "word"
    word: str = "hull"
    problems: int | None = None

    def prompt(self, number: int, split: Any = "train") -> Prompt:
        question = {"role": "user", "content": f"{split} {number}"}
        return Prompt(self.name, split, number, (question,), thinking=False)

    def size(self, split: Any = "train") -> int | None:
        return self.problems

    def gold(self, prompt):
        return ({"role": "assistant", "content": self.word},)

    def score(self, trace: Trace) -> dict[str, float]:
        return {REWARD: float(trace.final == self.word), "letters": len(trace.answer)}


class Sinking(Word):
    """Breaks at what a model would say to problem 1, while it has its hole."""

    name = "sinking"
    hole: ClassVar[bool] = True

    def score(self, trace: Trace) -> dict[str, float]:
        if self.hole and trace.prompt.number == 1 and trace.answer not in (*GARBAGE, self.word):
            raise ZeroDivisionError("a hole below the waterline")
        return super().score(trace)
