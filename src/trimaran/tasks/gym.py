"""reasoning-gym's generators as tasks: over a hundred families of puzzles, each with a scorer of its own.

The library is the extra `rl`. What it says about an answer becomes a reward only where it says "fully right"; part of
a point, such as for an answer of the right form, is a column beside it.
"""

import json
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from trimaran.errors import Refusal, nearest_first
from trimaran.tasks.draw import split_of
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

# Their scorers hand what a model has written to Python's `eval`, or to sympy's parser, which calls it.
EVALUATING = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
)
SIZE = 1000  # of one of the library's data sets; some lay out all of it when they are made
TRIED = 100  # items for one problem of a split
LONGEST = 10_000  # characters of an answer that a scorer is given
# What scorers raise over answers of another form than theirs. Such an answer is wrong; `unread` counts them.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError)


class Gym(Task):
    """One of reasoning-gym's families, by its name there, with its own settings.

    dataset: such as "chain_sum"; config: what its configuration takes; seed: its generator's. run_answers: "accept" to
    use a family whose scorer runs parts of answers as Python, in a place where nothing can be lost.
    """

    name: ClassVar[str] = "gym"
    dataset: str
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    run_answers: Literal["refuse", "accept"] = "refuse"
    thinking: bool = True

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        for place in range(number * TRIED, (number + 1) * TRIED):
            question = self._entry(place)["question"]
            if split_of(f"{self.dataset} {question}") == split:
                messages = ({"role": "user", "content": question},)
                return Prompt(self.name, split, number, messages, secret={"place": place}, thinking=self.thinking)
        found = f"dataset {self.dataset!r}: no {split} problem among {TRIED}"
        raise Refusal(found, "settings with many problems", "change `config`, or choose another dataset")

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        answer = self._entry(prompt.secret["place"])["answer"]
        if not isinstance(answer, str):
            raise Refusal(f"dataset {self.dataset!r} has no answer to show", "one that has", "choose another dataset")
        return ({"role": "assistant", "content": answer},)

    def score(self, trace: Trace) -> dict[str, float]:
        """`reward`: fully right; `partial`: what the library's scorer gives, 0 to 1; `unread`: it could not read it."""
        place, answer = trace.prompt.secret["place"], trace.final
        partial, unread = 0.0, False
        if answer and len(answer) <= LONGEST:
            try:
                partial = float(self._generator(place).score_answer(answer, self._entry(place)))
            except UNREADABLE:
                unread = True
        return {REWARD: float(partial >= 1), "partial": partial, "unread": float(unread)}

    def _entry(self, place: int) -> dict[str, Any]:
        """Item `place` of an endless row of the library's finite data sets."""
        entry: dict[str, Any] = self._generator(place)[place % SIZE]
        return entry

    def _generator(self, place: int) -> Any:
        if self.dataset in EVALUATING and self.run_answers == "refuse":
            found = f"dataset {self.dataset!r}, whose scorer runs parts of answers as Python"
            raise Refusal(found, "other datasets, or run_answers = 'accept' in a sandbox", "choose another dataset")
        seed = self.seed + place // SIZE * SIZE  # most items are drawn from seed + place
        return generator_of(self.dataset, json.dumps(self.config, sort_keys=True), seed)


@lru_cache(maxsize=64)
def generator_of(dataset: str, config: str, seed: int) -> Any:
    """The library's generator. Raises Refusal without the library, for an unknown name and for a setting it lacks."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as missing:
        if missing.name != "reasoning_gym":
            raise
        raise Refusal("task 'gym' without reasoning-gym", "the extra rl", "pip install 'trimaran[rl]'") from None
    if dataset not in DATASETS:
        known = nearest_first(dataset, DATASETS)[:8]
        raise Refusal(f"unknown dataset {dataset!r}", ", ".join(known), f"did you mean {known[0]!r}?")
    try:
        return reasoning_gym.create_dataset(dataset, seed=seed, size=SIZE, **json.loads(config))
    except (TypeError, ValueError, AssertionError) as problem:
        fields = ", ".join(DATASETS[dataset][1].__dataclass_fields__)
        raise Refusal(f"dataset {dataset!r}: {problem}", fields, "correct `config`") from None
