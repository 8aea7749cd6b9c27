"""How long a draft block's drafts stand: tokens per pass of the whole model, as the engine decodes with them.

    acceptance length = tokens said / passes, the pass that reads the prompt and its token left out

1 means that no draft ever stood; with k tokens proposed it is at most k + 1. Under coupled acceptance the answers are
the very ones that plain decoding gives, so two draft blocks of one trunk are measured on the same texts, token for
token, and their difference is that of pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings
from trimaran.evals.play import Group, Played, Player
from trimaran.model.hybrid import HybridModel
from trimaran.text.tokenizer import Tokenizer

RESAMPLED = 1000  # draws of the bootstrap


@dataclass(frozen=True)
class Acceptance:
    """Per prompt, in their order: tokens after each answer's first, passes that gave them, drafts made and standing."""

    tokens: tuple[int, ...]
    passes: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def length(self) -> float:
        """Tokens per pass; 1 where nothing was said after first tokens."""
        return sum(self.tokens) / sum(self.passes) if sum(self.passes) else 1.0

    def summary(self) -> dict[str, Any]:
        """For results: the length with its 95 % interval over prompts, the share of drafts that stood, counts."""
        share = sum(self.accepted) / max(1, sum(self.drafted))
        counts = {"tokens": sum(self.tokens), "passes": sum(self.passes), "prompts": len(self.tokens)}
        return {"length": self.length, "interval": interval([self]), "accepted_share": share, **counts}


def measure(
    model: HybridModel, tokenizer: Tokenizer, groups: Iterable[Group], draft: int, settings: EngineSettings
) -> Acceptance:
    """Answers the groups' prompts with `draft` tokens of the model's own draft block per pass."""
    engine = Engine(model, tokenizer, settings.replace(drafter="mtp", draft=draft, acceptance="coupled"))
    played = sorted(Player(engine).play(groups), key=lambda one: (one.group, one.sample))
    rows = [counted(one) for one in played]
    return Acceptance(*(tuple(column) for column in zip(*rows, strict=True)))


def counted(played: Played) -> tuple[int, int, int, int]:
    """What `Acceptance` holds, of one episode."""
    outputs = played.outputs
    tokens = sum(len(one.tokens) - 1 for one in outputs)
    passes = sum(one.passes - 1 for one in outputs)
    return tokens, passes, sum(one.drafted for one in outputs), sum(one.accepted for one in outputs)


def interval(measured: Sequence[Acceptance], seed: int = 0) -> list[float]:
    """The 95 % bootstrap interval over prompts of the length, or of the last one's less the first one's."""
    pairs = [np.array([one.tokens, one.passes], dtype=np.float64) for one in measured]
    drawn = np.random.default_rng(seed).integers(pairs[0].shape[1], size=(RESAMPLED, pairs[0].shape[1]))
    sums = [pair[:, drawn].sum(-1) for pair in pairs]
    lengths = [np.where(passes > 0, tokens / np.maximum(passes, 1), 1.0) for tokens, passes in sums]
    found = lengths[0] if len(lengths) == 1 else lengths[-1] - lengths[0]
    return [float(value) for value in np.quantile(found, [0.025, 0.975])]


def compared(before: Mapping[str, Acceptance], after: Mapping[str, Acceptance]) -> dict[str, Any]:
    """{way of choosing: {before, after, gain, gain_interval}} for results.json."""
    return {
        name: {
            "before": before[name].summary(),
            "after": after[name].summary(),
            "gain": after[name].length - before[name].length,
            "gain_interval": interval([before[name], after[name]]),
        }
        for name in before
    }
