"""Which source and which length comes when: weights, phases, and two lengths taking turns.

Everything is decided by counting, not by chance: at each draw the entry furthest behind its share is taken, so no
entry is ever more than one draw ahead, and shares are met as closely as whole draws allow.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal, nearest_first


class Length(Settings):
    """One of the sequence lengths that take turns in a phase; all rows of a step have the same."""

    sequence_length: int = Field(gt=0)
    share: float = Field(default=1.0, gt=0)  # of the steps of the phase
    weights: dict[str, float] | None = None  # of the sources at this length; the phase's where absent


class Phase(Settings):
    """One stretch of training, until the fraction `until` of its steps."""

    until: float = Field(default=1.0, gt=0, le=1)
    weights: dict[str, float] | None = None  # of the sources, per token; the mixture's where absent
    lengths: tuple[Length, ...] = ()  # the recipe's sequence length where empty


class Mixture(Settings):
    """Sources by weight, in phases. Without weights a source counts by its tokens; without phases there is one.

    A step has the same number of tokens at every length: rows × sequence_length of the recipe.
    """

    weights: dict[str, float] | None = None
    phases: tuple[Phase, ...] = (Phase(),)

    @model_validator(mode="after")
    def phases_in_order(self) -> "Mixture":
        borders = [phase.until for phase in self.phases]
        if not borders or borders != sorted(set(borders)) or borders[-1] != 1:
            raise Refusal(f"phases end at {borders}", "rising fractions, the last 1.0", "correct phases.until")
        return self

    def phase_at(self, step: int, steps: int | None) -> int:
        """The number of the phase that holds step `step` of `steps`."""
        if len(self.phases) == 1:
            return 0
        if steps is None:
            raise Refusal("phases without a number of steps", "a known number of steps", "set train.steps")
        return next((n for n, phase in enumerate(self.phases) if step < phase.until * steps), len(self.phases) - 1)

    def lengths_of(self, phase: int, sequence_length: int) -> tuple[Length, ...]:
        return self.phases[phase].lengths or (Length(sequence_length=sequence_length),)

    def weights_of(self, phase: int, length: Length, tokens: Mapping[str, int]) -> dict[str, float]:
        """Share of each source in `tokens` (source -> its size), summing to 1."""
        weights = first_given(length.weights, self.phases[phase].weights, self.weights, dict(tokens))
        for name, weight in weights.items():
            if name not in tokens:
                raise Refusal(
                    f"weight for unknown source {name!r}", ", ".join(nearest_first(name, tokens)), "rename it"
                )
            if weight < 0:
                raise Refusal(f"weight {weight} of source {name!r}", "0 or more", "correct data.weights")
        total = sum(weights.values())
        if total <= 0:
            raise Refusal(f"weights {weights}", "at least one above 0", "correct data.weights")
        return {name: weight / total for name, weight in weights.items() if weight > 0}


def first_given(*candidates: dict[str, float] | dict[str, int] | None) -> dict[str, float]:
    return next(dict(one) for one in candidates if one is not None)


def furthest_behind(shares: Sequence[float], drawn: Sequence[int]) -> int:
    """The entry whose count lags its share most, were one more drawn; the first of equals."""
    total = sum(drawn) + 1
    return max(range(len(shares)), key=lambda entry: shares[entry] / sum(shares) * total - drawn[entry])
