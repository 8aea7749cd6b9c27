"""One continuation while it grows: its tokens, its text, and when it is over."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from trimaran.engine.choose import Ask
from trimaran.engine.guide import Guide
from trimaran.engine.sampler import Sampling, key_of
from trimaran.engine.stop import Reader
from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.text.tokenizer import Tokenizer

Finish = Literal["eos", "stop", "length"]


@dataclass
class Output:
    """One continuation of one prompt.

    tokens: all that were chosen, the end token or those that completed a stop string included. text: what they spell,
    without the end token, up to the stop string ("" when no tokenizer was given). finish: an end token, a stop string,
    or max_tokens; `stop` is the end token's id or the stop string, None where the row's guide ended it. logprobs:
    natural logarithms of the chosen tokens' probabilities under the model's own law, law_logprobs: under the law that
    the settings made of it; None unless asked for. passes: passes of the whole model that gave tokens, the prompt's
    included; drafted, accepted: tokens that the draft block proposed, and those of them that stand in `tokens`.
    cached: prompt tokens that a prefix cache spared.
    """

    prompt: int
    sample: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    stop: int | str | None = None
    logprobs: list[float] | None = None
    law_logprobs: list[float] | None = None
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    cached: int = 0


class Row:
    """A row of the batch: what it has said so far (`output`) and how it goes on (`settings`)."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        output: Output,
        settings: Sampling,
        config: ModelConfig,
        reader: Reader | None,
        guide: Guide | None = None,
    ):
        self.number, self.output, self.settings, self.reader = number, output, settings, reader
        self.guide = guide
        self.key = key_of(output.seed, output.sample, prompt)
        eos = () if config.eos_token_id is None else (config.eos_token_id,)
        own = () if settings.ignore_eos else (*eos, *config.stop_token_ids)
        self.ends = frozenset((*own, *settings.stop_ids))
        if settings.logprobs:
            output.logprobs, output.law_logprobs = [], []

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.settings.max_tokens - len(self.output.tokens)

    def ask(self, seen: Tensor | None, drafts: Sequence[int] = (), law: Tensor | None = None, top: int = 0) -> Ask:
        """What the choice of its next tokens depends on; see `Ask`."""
        return Ask(self.settings, self.key, len(self.output.tokens), seen, self.guide, drafts, law, top)

    def push(self, token: int, logprobs: Sequence[float] | None) -> str:
        """Takes a token, ends the row where it must end, and returns the text that is settled.

        logprobs: the token's under the model's law and under the sampling law, when the row asks for them.
        """
        output = self.output
        output.tokens.append(token)
        if output.logprobs is not None and output.law_logprobs is not None:
            assert logprobs is not None
            output.logprobs.append(logprobs[0])
            output.law_logprobs.append(logprobs[1])
        text = ""
        if self.guide is not None:
            self.guide.push(token)
        if token in self.ends:
            output.finish, output.stop = "eos", token
        elif self.reader is not None:
            text = self.reader.push(token)
        if output.finish is None and self.guide is not None and self.guide.ended:
            output.finish = "eos"
        if output.finish is None and self.room == 0:
            output.finish = "length"
        if self.reader is not None:
            if output.finish is not None:
                text += self.reader.finish()
            if self.reader.stopped is not None:
                output.finish, output.stop = "stop", self.reader.stopped
        output.text += text
        return text


def open_rows(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    tokenizer: Tokenizer | None,
    guides: Sequence[Callable[[], Guide] | None] | None = None,
) -> list[Row]:
    """A row for each sample of each prompt, in that order; refuses prompts that no model could continue.

    guides: for each prompt, what makes the guide of each of its samples.
    """
    rows: list[Row] = []
    guides = guides or [None] * len(prompts)
    for number, (prompt, one, new_guide) in enumerate(zip(prompts, settings, guides, strict=True)):
        check_prompt(prompt, number, config)
        if one.stop and tokenizer is None:
            raise Refusal(f"stop = {list(one.stop)} without a tokenizer", "stop_ids", "give generate the tokenizer")
        seed = secrets.randbits(32) if one.seed is None else one.seed
        for sample in range(one.samples):
            reader = None if tokenizer is None else Reader(tokenizer.stream(), one.stop)
            guide = None if new_guide is None else new_guide()
            rows.append(Row(len(rows), prompt, Output(number, sample, seed), one, config, reader, guide))
    return rows


def check_prompt(prompt: Sequence[int], number: int, config: ModelConfig) -> None:
    if not len(prompt):
        first = "a token" if config.bos_token_id is None else f"the bos token, {config.bos_token_id}"
        raise Refusal(f"prompt {number} is empty", "at least one token", f"begin it with {first}")
    bad = [token for token in prompt if not 0 <= token < config.vocab_size]
    if bad:
        raise Refusal(
            f"token id {bad[0]} in prompt {number}",
            f"0 to {config.vocab_size - 1}",
            "encode the text with this model's own tokenizer",
        )
