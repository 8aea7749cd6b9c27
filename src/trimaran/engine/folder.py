"""A folder opened for generation: model, tokenizer, what its texts begin with, whether it has learnt to converse."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from trimaran import config
from trimaran.engine.plain import check_draft
from trimaran.engine.row import Output
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import OpsSettings, choose
from trimaran.text.tokenizer import TURNS, Tokenizer


class FolderSettings(Sampling):
    """Sampling, drafting, and where and in which numbers the model is held."""

    draft: int = Field(0, ge=0)  # tokens that the model's draft block (MTP) proposes per pass
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    ops: OpsSettings = OpsSettings()


@dataclass(frozen=True)
class Folder:
    """lead: ids that every text begins with, as in training. base: why this is a base model, None where it is not."""

    model: HybridModel
    tokenizer: Tokenizer
    lead: tuple[int, ...]
    base: str | None

    def ending(self, settings: FolderSettings) -> FolderSettings:
        """The settings with the tokenizer's end tokens added: a configuration often names only one of several."""
        if settings.ignore_eos:
            return settings
        return settings.replace(stop_ids=tuple(dict.fromkeys([*settings.stop_ids, *self.tokenizer.stop_ids])))


def open_folder(target: str, settings: FolderSettings) -> Folder:
    """Opens a run folder, or any hub folder whose architecture is ours."""
    path = Path(target)
    if not path.is_dir():
        raise Refusal(f"no folder {target!r}", "a run or hub folder with config.json", "train one, or correct the path")
    check_draft(settings.draft, hub.read_config(path))  # before gigabytes are read
    choose(settings.ops.backend)
    tokenizer = Tokenizer.load(path)
    stage = config.read(path / "recipe.toml").get("stage") if (path / "recipe.toml").exists() else None
    model = hub.load(path, dtype=getattr(torch, settings.dtype), device=placed(settings.device))
    return Folder(model.eval(), tokenizer, lead(tokenizer, trained_here=stage is not None), base(stage, tokenizer))


def open_draft(target: str, settings: FolderSettings, folder: Folder) -> Folder:
    """The small model that drafts for another, which must read the same tokens."""
    draft = open_folder(target, FolderSettings(device=settings.device, dtype=settings.dtype))
    if draft.tokenizer.digest != folder.tokenizer.digest:
        raise Refusal(
            f"draft_model = {target!r} with another tokenizer",
            "a model with the very same tokenizer.json",
            "choose another, or leave draft_model out",
        )
    return draft


def placed(device: str) -> torch.device:
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise Refusal(f"device = {device!r}", "cpu, cuda, cuda:1, mps", "name a device") from None
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            f"device = {device!r}", "cpu, for torch sees no GPU", "leave device out, or install torch for CUDA"
        )
    return asked


def lead(tokenizer: Tokenizer, trained_here: bool) -> tuple[int, ...]:
    """Ids before every text: bos where we trained, else what the tokenizer's own post-processor puts there."""
    if trained_here or tokenizer.config.get("bos_token") == TURNS[1]:
        return () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    bare = tokenizer.marked.encode("a", add_special_tokens=False).ids
    whole = tokenizer.marked.encode("a", add_special_tokens=True).ids
    before = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return tuple(whole[:before])


def base(stage: str | None, tokenizer: Tokenizer) -> str | None:
    """Why a model with this training stage (None: unknown) and tokenizer is a base model; None when it is not."""
    if stage == "pretrain":
        return "it was pretrained and nothing more"
    return "its folder has no chat template" if stage is None and tokenizer.template is None else None


def read_input() -> str:
    """All of stdin as text, without the line end that closes it."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as problem:
        raise Refusal(f"input is not text (byte {problem.start})", "UTF-8", "give text") from None


def account(outputs: list[Output], prompt_tokens: int, first: float, rest: float) -> str:
    """What a generation took, in one line. first: seconds until the first token of all rows; rest: those after it."""
    made = sum(len(output.tokens) for output in outputs)
    later = made - len(outputs)
    known = sum(output.cached for output in outputs)
    prompt = f"prompt of {prompt_tokens} token{'s'[: prompt_tokens != 1]}" + f" ({known} of them known)" * bool(known)
    words = [f"{prompt} in {first:.2f} s"]
    words.append(f"{made} token{'s'[: made != 1]}")
    if later and rest:
        words[-1] += f", {later / rest:.0f} tokens/s"
    drafted, accepted = sum(output.drafted for output in outputs), sum(output.accepted for output in outputs)
    if drafted:
        passes = sum(output.passes for output in outputs)
        words.append(f"drafts accepted {accepted} of {drafted} ({accepted / drafted:.0%})")
        words.append(f"{made / passes:.2f} tokens per pass")
    words.append(f"seed {outputs[0].seed}")
    return " · ".join(words)
