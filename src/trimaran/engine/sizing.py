"""How much memory an engine gets, and which of its settings work against one another."""

import torch

from trimaran.engine.pages import Memory, Unit, checked_ssm_dtype, share_out
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel

USUAL_TOKENS = 4096  # per row: what memory is made for on a CPU when nobody says how much
SNAPSHOT_SHARE = 4  # one byte in this many is for snapshots, when nobody says how many they are
DEVICE_SHARE = 0.8  # of an accelerator's free memory; the rest is for activations


def fitted(
    model: HybridModel, settings: EngineSettings, draft_model: HybridModel | None = None
) -> tuple[Memory, Memory | None]:
    """The memory of the model, and that of a draft model where there is one."""
    budget = settings.memory_bytes
    if budget is None and model.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(model.device)[0] * DEVICE_SHARE)
    share = 1.0
    if draft_model is not None:
        own, others = row_bytes(model, settings, 1), row_bytes(draft_model, settings, 2)
        share = own / (own + others)
    # Without a budget, pages for the usual number of tokens.
    pages = settings.rows * -(-USUAL_TOKENS // settings.page) if budget is None else None
    memory = Memory(
        model,
        rows=settings.rows,
        bytes=None if budget is None else int(budget * share),
        pages=pages,
        page=settings.page,
        snapshots=snapshots(model, settings, None if budget is None else int(budget * share), pages),
        draft=most_drafts(settings),
        ssm_dtype=ssm_dtype(settings),
    )
    if settings.shared_prefix is not None:
        memory.sharing = "always" if settings.shared_prefix else "never"
    if draft_model is None:
        return memory, None
    # A row of the draft model has a twin while it drafts, whose last page is its own.
    drafts = Memory(
        draft_model,
        rows=2 * settings.rows,
        bytes=None if budget is None else int(budget * (1 - share)),
        pages=pages,
        page=settings.page,
    )
    return memory, drafts


def row_bytes(model: HybridModel, settings: EngineSettings, slots: int) -> int:
    """Bytes of a row with the usual number of tokens, in `slots` slots."""
    unit = unit_of(model, settings)
    return slots * unit.row_bytes + USUAL_TOKENS * unit.kv_token


def unit_of(model: HybridModel, settings: EngineSettings) -> Unit:
    """Bytes of the pieces that the model's memory is made of."""
    wide = checked_ssm_dtype(ssm_dtype(settings), model.dtype)
    return Unit.of(model.config, model.dtype, wide, settings.page, most_drafts(settings))


def snapshots(model: HybridModel, settings: EngineSettings, budget: int | None, pages: int | None) -> int:
    """How many states the prefix cache may keep: as many as asked for, else what a share of the memory holds.

    A number that suits all would be too few for small states, of which every answer leaves two, and too much memory
    for large ones. Without a budget there is at least one for each row, so that as many conversations can go on.
    """
    if not settings.prefix_cache or "M" not in model.config.pattern:
        return 0
    if settings.snapshots is not None:
        return settings.snapshots
    unit = unit_of(model, settings)
    if budget is not None:
        return share_out(unit, budget, settings.rows, budget // SNAPSHOT_SHARE // unit.snapshot_bytes)[1]
    assert pages is not None
    others = settings.rows * unit.row_bytes + pages * unit.page_bytes
    return max(settings.rows, others // (SNAPSHOT_SHARE - 1) // unit.snapshot_bytes)


def ssm_dtype(settings: EngineSettings) -> torch.dtype | None:
    return torch.float16 if settings.ssm_dtype == "float16" else None


def most_drafts(settings: EngineSettings) -> int:
    """The most tokens that a row may have on trial."""
    return 0 if settings.drafter == "none" else settings.draft or settings.draft_limit


def check_drafter(settings: EngineSettings, model: HybridModel, draft_model: HybridModel | None) -> None:
    """Refuses a drafter that this model does not have, or that does not speak its tokens."""
    if settings.drafter == "mtp" and model.mtp is None:
        raise Refusal('drafter = "mtp" for a model without a draft block', "none, lookup, model", "choose another")
    if (settings.drafter == "model") != (draft_model is not None):
        given = "without a draft model" if draft_model is None else "with a draft model"
        raise Refusal(f'drafter = "{settings.drafter}" {given}', 'drafter = "model" and a draft model', "give both")
    if draft_model is not None and draft_model.config.vocab_size != model.config.vocab_size:
        found = f"a draft model with a vocabulary of {draft_model.config.vocab_size}"
        raise Refusal(found, f"the model's, {model.config.vocab_size}", "take one with the same tokenizer")


def warnings(settings: EngineSettings, memory: Memory) -> list[str]:
    """What a user would want to be told at the start, in sentences."""
    said = []
    if settings.prefix_cache and "M" in memory.config.pattern and not memory.total_snapshots:
        why = "snapshots = 0" if settings.snapshots == 0 else "the memory has no room for snapshots of Mamba's states"
        said.append(f"The prefix cache can never hit: {why}.")
    if 0 < memory.total_snapshots < memory.total_slots and settings.prefix_cache:
        few = f"{memory.total_snapshots} snapshots are few for {memory.total_slots} rows"
        said.append(f"{few}: a conversation's state may be forgotten before it goes on.")
    tokens = memory.total_pages * memory.page
    if memory.total_pages and tokens < settings.rows * USUAL_TOKENS // 8:
        said.append(f"Memory for {tokens} tokens is little for {memory.total_slots} rows; many will wait.")
    if settings.drafter == "none" and settings.draft:
        said.append(f'draft = {settings.draft} does nothing while drafter = "none".')
    return said
