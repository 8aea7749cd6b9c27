"""From logits to the next token.

The law of a row, step by step, in the order of transformers' processors:

    1. repetition_penalty   logits of tokens seen, in prompt or output: divided by it when positive, else multiplied
    2. temperature          logits / temperature; 0 is greedy: all the mass on the largest logit
    3. top_k                the k largest stay (ties with the k-th too)
    4. top_p                the least probable tokens whose masses sum to at most 1 - top_p go; the likeliest stays
    5. min_p                tokens less probable than min_p times the likeliest go

The draw inverts the cumulated law at a number that depends only on (seed, sample, prompt, place in the output). No
generator is advanced, so a row gives the same tokens alone and in any batch, and a token verified after a draft is the
very token that would have been drawn without one. The prompt is in it so that one seed serves many prompts without
pulling all of them towards the same tail of their laws.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from trimaran.config import Settings
from trimaran.ops.numbers import at_least_fp32


class Sampling(Settings):
    """How one prompt is continued. The defaults follow the model's own law."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)  # 0: greedy
    top_k: int = Field(0, ge=0, lt=2**31)  # 0: all
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)  # far beyond, logits overflow
    max_tokens: int = Field(256, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # texts before which the output ends
    stop_ids: tuple[int, ...] = ()  # tokens that end it, besides the model's own
    ignore_eos: bool = False  # goes on after the model's own end tokens (not after stop_ids)
    samples: int = Field(1, ge=1)  # continuations of the one prompt
    seed: int | None = Field(None, ge=0)  # None: a fresh one, told in the output
    logprobs: bool = False  # also report log-probabilities of the chosen tokens

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Law:
    """The settings of a batch's rows as columns [B, 1]; None where no row asks for the step."""

    greedy_B1: Tensor | None
    all_greedy: bool
    temperature_B1: Tensor
    top_k_B1: Tensor | None
    top_p_B1: Tensor | None
    min_p_B1: Tensor | None
    penalty_B1: Tensor | None

    @classmethod
    def of(cls, settings: Sequence[Sampling], device: torch.device | str = "cpu") -> "Law":
        """The law of one batch, a row per element of `settings`."""

        def column(name: str, neutral: float) -> Tensor | None:
            values = [getattr(one, name) for one in settings]
            if all(value == neutral for value in values):
                return None
            kind = torch.long if name == "top_k" else torch.float64
            return torch.tensor(values, dtype=kind, device=device)[:, None]

        temperatures = [one.temperature for one in settings]
        greedy = [t == 0 for t in temperatures]
        return cls(
            torch.tensor(greedy, device=device)[:, None] if any(greedy) else None,
            all(greedy),
            torch.tensor([t or 1.0 for t in temperatures], dtype=torch.float64, device=device)[:, None],
            column("top_k", 0),
            column("top_p", 1.0),
            column("min_p", 0.0),
            column("repetition_penalty", 1.0),
        )

    def scores(self, logits_BV: Tensor, seen_BV: Tensor | None) -> Tensor:
        """Logits in at least fp32 after the repetition penalty, which is all that a greedy choice looks at."""
        scores_BV = at_least_fp32(logits_BV)
        if self.penalty_B1 is None:
            return scores_BV
        assert seen_BV is not None, "a repetition penalty needs the tokens seen"
        penalty_B1 = self.penalty_B1.to(scores_BV.dtype)
        punished_BV = torch.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
        return torch.where(seen_BV, punished_BV, scores_BV)

    def probabilities(self, logits_BV: Tensor, seen_BV: Tensor | None = None) -> Tensor:
        """The law over the next token [B, V], in at least fp32.

        seen_BV: True for tokens of the row's prompt and output; needed where a row has a repetition penalty.
        """
        scores_BV = self.scores(logits_BV, seen_BV)
        best_B1 = scores_BV.argmax(-1, keepdim=True)
        if self.all_greedy:
            return torch.zeros_like(scores_BV).scatter(1, best_B1, 1)
        # Less the largest, so that a temperature next to 0 gives 0 and -inf, not inf - inf.
        temperature_B1 = self.temperature_B1.to(scores_BV.dtype).clamp(min=torch.finfo(scores_BV.dtype).tiny)
        scores_BV = (scores_BV - scores_BV.gather(1, best_B1)) / temperature_B1
        if self.top_k_B1 is not None:
            scores_BV = keep_top_k(scores_BV, self.top_k_B1)
        if self.top_p_B1 is not None:
            scores_BV = keep_top_p(scores_BV, self.top_p_B1.to(scores_BV.dtype))
        if self.min_p_B1 is not None:
            scores_BV = keep_min_p(scores_BV, self.min_p_B1.to(scores_BV.dtype))
        law_BV = scores_BV.softmax(-1)
        if self.greedy_B1 is None:
            return law_BV
        return torch.where(self.greedy_B1, torch.zeros_like(law_BV).scatter(1, best_B1, 1), law_BV)


def keep_top_k(scores_BV: Tensor, k_B1: Tensor) -> Tensor:
    """-inf for all below each row's k-th largest; k = 0 keeps the row whole."""
    width = scores_BV.shape[-1]
    place_B1 = torch.where(k_B1 == 0, width, k_B1).clamp(max=width) - 1
    kth_B1 = scores_BV.topk(int(place_B1.max()) + 1).values.gather(1, place_B1)
    return scores_BV.masked_fill(scores_BV < kth_B1, -torch.inf)


def keep_top_p(scores_BV: Tensor, p_B1: Tensor) -> Tensor:
    """-inf for the least probable tokens whose masses sum to at most 1 - p; the likeliest always stays."""
    rising_BV, order_BV = scores_BV.sort(-1)
    out_BV = rising_BV.softmax(-1).cumsum(-1) <= 1 - p_B1
    out_BV[:, -1] = False
    # p = 1 keeps the row whole: without it, tokens that underflow to a mass of 0 would go.
    out_BV &= p_B1 < 1
    return scores_BV.masked_fill(torch.zeros_like(out_BV).scatter(1, order_BV, out_BV), -torch.inf)


def keep_min_p(scores_BV: Tensor, p_B1: Tensor) -> Tensor:
    """-inf for tokens less probable than p times the likeliest."""
    law_BV = scores_BV.softmax(-1)
    return scores_BV.masked_fill(law_BV < p_B1 * law_BV.max(-1, keepdim=True).values, -torch.inf)


def probabilities(logits_BV: Tensor, settings: Sequence[Sampling], seen_BV: Tensor | None = None) -> Tensor:
    """The law that `settings` (one per row) make of the logits [B, V], in at least fp32."""
    return Law.of(settings, logits_BV.device).probabilities(logits_BV, seen_BV)


def key_of(seed: int, sample: int, prompt: Sequence[int]) -> bytes:
    """What the draws of one row hang on."""
    words = f"{seed} {sample} {' '.join(str(int(token)) for token in prompt)}"
    return hashlib.blake2b(words.encode(), digest_size=32).digest()


def uniform(key: bytes, place: int) -> float:
    """The row's number in [0, 1) for the token at `place` of its output: uniform, and independent of all others.

    52 bits of BLAKE2: few enough that u * total < total for every total of a cumulated law.
    """
    digest = hashlib.blake2b(place.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / 2.0**52


def draw(law_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """The token of each row [B] where its law, cumulated in fp64, passes the row's uniform number."""
    cumulated_BV = law_BV.double().cumsum(-1)
    aim_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=law_BV.device)[:, None] * cumulated_BV[:, -1:]
    # The first place above the aim: a token of no mass does not rise above its neighbour, so it is never drawn.
    return torch.searchsorted(cumulated_BV, aim_B1, right=True)[:, 0]
