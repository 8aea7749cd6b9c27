"""What the engine is asked, what it answers, and how it is set up."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from trimaran.config import Settings
from trimaran.engine.choose import Acceptance
from trimaran.engine.guide import Guide
from trimaran.engine.row import Output
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal

Drafter = Literal["none", "mtp", "lookup", "model"]


def fresh_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how to continue it, `sampling.samples` times.

    priority: the smaller, the sooner; equal ones in the order they came. guide: called once per sample, makes what
    narrows its choices. turns: numbers of prompt tokens after which a turn ends; the prefix cache remembers the state
    there. top_logprobs: also report that many of the likeliest tokens at each place, under the model's own law.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    guide: Callable[[], Guide] | None = None
    turns: tuple[int, ...] = ()
    top_logprobs: int = 0
    id: str = field(default_factory=fresh_id)


@dataclass(frozen=True)
class Piece:
    """What one pass gave to one sample of a request.

    tokens, text: as in `Output`, only what is new. logprobs: of these tokens under the model's own law, when asked
    for. top: for each of these tokens the likeliest ones there, as (id, log-probability), the likeliest first, when
    asked for. output: the whole, in the sample's last piece. error: why the request ends here without an output.
    """

    request: str
    sample: int
    tokens: list[int]
    text: str
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    output: Output | None = None
    error: Exception | None = None


class EngineSettings(Settings):
    """How an engine uses its memory and its passes."""

    rows: int = Field(64, ge=1)  # texts that grow at once
    tokens_per_pass: int = Field(512, ge=1)  # read in one pass, drafts included; a row that decodes always gets its own
    memory_bytes: int | None = Field(None, ge=1)  # keys, values and states; None: fitted to the model and the device
    page: int = Field(32, ge=1)  # tokens per page of keys and values
    prefix_cache: bool = True  # whether what requests read is kept for those that begin alike
    snapshots: int | None = Field(None, ge=0)  # Mamba states kept for the prefix cache; None: a quarter of the memory
    snapshot_every: int = Field(256, ge=0)  # prompt tokens between two snapshots; 0: only at ends of turns and prompts
    drafter: Drafter = "none"  # who proposes tokens for verification
    draft: int = Field(0, ge=0)  # tokens proposed per row and pass; 0: adapted to what stands and what it costs
    draft_limit: int = Field(15, ge=1)  # the most that adapting may propose
    acceptance: Acceptance = "coupled"  # coupled: the very tokens that no draft would give
    ssm_dtype: Literal["model", "float16"] = "model"  # how Mamba states are held; float16 rounds stochastically
    shared_prefix: bool | None = None  # rows that share pages read them once; None: where it pays


@dataclass(frozen=True)
class Stats:
    """Counts: where the engine stands now, and what it has done since it was made.

    cached_pages, cached_snapshots: held by the prefix cache until they are needed; running texts may hold the same.
    prompt_tokens: of all prompts admitted; cached_tokens: those of them that the prefix cache spared;
    recomputed_tokens, recomputed_bytes: tokens read although they had been read before (by rows that were preempted,
    and those that the cache knew past its last state), and the keys and values written for them. tokens: chosen ones.
    passes: of the whole model.
    """

    running: int
    waiting: int
    free_pages: int
    total_pages: int
    free_slots: int
    total_slots: int
    free_snapshots: int
    total_snapshots: int
    cached_pages: int
    cached_snapshots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    recomputed_bytes: int
    evictions: int
    preemptions: int
    drafted: int
    accepted: int
    passes: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def check_request(request: Request, vocabulary: int) -> None:
    """Refuses ends of turns that lie outside of the prompt, and more of the likeliest tokens than there are."""
    bad = [turn for turn in request.turns if not 0 < turn <= len(request.prompt)]
    if bad:
        allowed = f"1 to {len(request.prompt)}, the prompt's length"
        raise Refusal(f"a turn that ends after {bad[0]} tokens", allowed, "give ends of turns inside the prompt")
    if not 0 <= request.top_logprobs <= vocabulary:
        found, allowed = f"top_logprobs = {request.top_logprobs}", f"0 to {vocabulary}, the vocabulary"
        raise Refusal(found, allowed, "ask for fewer")
