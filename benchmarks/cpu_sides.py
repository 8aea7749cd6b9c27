"""The models of benchmarks/cpu.py, and the turns that ours and transformers take in each of its cases.

Both sides get the same weights and the same tokens. transformers runs at its defaults (sdpa attention, grouped_mm
experts, cache), with `dt` unclamped in prefill, since the clamp is not in the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.engine.plain import prefill
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel
from trimaran.ops.loss import cross_entropy
from trimaran.train.balance import Balance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 64  # decoding: tokens before

SIZES: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 4,
    "chunk_size": 128,
}
EXPERTS: dict[str, Any] = {
    "pattern": "MEME*E" * 3,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_shared_expert_intermediate_size": 768,
}
MODELS = {
    "dense": ModelConfig(pattern="M-M-M*-" * 3, intermediate_size=3072, **SIZES),
    "moe": ModelConfig(moe_intermediate_size=384, **EXPERTS, **SIZES),
    "moelat": ModelConfig(moe_latent_size=384, moe_intermediate_size=768, **EXPERTS, **SIZES),
}
TINY = ModelConfig(
    pattern="ME*E",
    mtp_pattern="*E",
    vocab_size=2048,
    hidden_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    mamba_num_heads=6,
    mamba_head_dim=64,
    ssm_state_size=32,
    n_groups=1,
    chunk_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=96,
    moe_intermediate_size=192,
    moe_shared_expert_intermediate_size=384,
)
BIAS_RATE, DRAFT_SCALE = 1e-3, 0.2  # of the tiny model's training: routers' bias step, weight of the draft block's loss


@dataclass(frozen=True)
class Side:
    """One turn of a case: `turn` does the work of `tokens` tokens and returns what is compared.

    spent: wall and CPU seconds of the newest turn, for a side that works in another process.
    """

    turn: Callable[[], Tensor]
    tokens: int
    spent: Callable[[], tuple[float, float]] | None = None


def random_tokens(batch: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """Ids with a long tail, as in text, so that experts are not loaded evenly by construction."""
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return (uniform**3 * vocab).long()


def case_tokens(case: str, vocab: int) -> Tensor:
    """What every side of a case reads [rows, tokens]: all of it at once, or PROMPT tokens and then one at a time."""
    kind, size = case.split()
    if kind == "train":
        rows, length = map(int, size.split("x"))
        return random_tokens(rows, length, vocab)
    if kind == "prefill":
        return random_tokens(1, int(size), vocab)
    rows = int(size[1:])
    return random_tokens(rows, PROMPT + max(24, 64 // rows), vocab)


def training(model: nn.Module, loss: Callable[[], Tensor], tokens: int, dtype: str, clip: float = 0.0) -> Side:
    """One optimizer step, alike for all sides."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def turn() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()[None]

    return Side(turn, tokens)


def our_training(model: HybridModel, tokens: Tensor, dtype: str) -> Side:
    """Forward, backward, AdamW, on the targets that transformers' own loss takes."""
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0

    def loss() -> Tensor:
        hidden = model.hidden(tokens).flatten(0, 1)
        return cross_entropy(hidden, model.head, tokens.roll(-1, 1).flatten(), weights.flatten()) / weights.sum()

    return training(model, loss, tokens.numel(), dtype)


def peer_training(model: Any, tokens: Tensor, dtype: str) -> Side:
    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return training(model, loss, tokens.numel(), dtype)


def tiny_rows(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [8, 256], the tokens after them, and those after these."""
    tokens = random_tokens(8, 258, vocab)
    return tokens[:, :256], tokens[:, 1:257], tokens[:, 2:]


def tiny_training(model: HybridModel) -> Side:
    """The demo's step: next token, draft block, biases of the routers."""
    inputs, one, two = tiny_rows(model.config.vocab_size)
    weights = torch.full((inputs.numel(),), 1 / inputs.numel())
    balance = Balance(model, BIAS_RATE)

    def loss() -> Tensor:
        hidden = model.hidden(inputs)
        assert model.mtp is not None
        deeper = model.mtp(hidden, one)
        drafted = cross_entropy(deeper.flatten(0, 1), model.head, two.flatten(), weights)
        balance.collect()
        balance.step()
        return cross_entropy(hidden.flatten(0, 1), model.head, one.flatten(), weights) + DRAFT_SCALE * drafted

    return training(model, loss, inputs.numel(), "bf16", clip=1.0)


def our_prefill(model: HybridModel, tokens: Tensor) -> Side:
    model.eval()

    @torch.no_grad()
    def turn() -> Tensor:
        return model.head(prefill(model, tokens.tolist())[1])[:, -1]

    return Side(turn, tokens.numel())


def peer_prefill(model: Any, tokens: Tensor) -> Side:
    model.eval()

    @torch.no_grad()
    def turn() -> Tensor:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    return Side(turn, tokens.numel())


def our_decoding(model: HybridModel, tokens: Tensor) -> Side:
    """Tokens on a cache that grows; given ones are fed, so that all sides read the same."""
    model.eval()
    with torch.no_grad():
        state, _ = prefill(model, tokens[:, :PROMPT].tolist())

    @torch.no_grad()
    def turn() -> Tensor:
        for n in range(PROMPT, tokens.shape[1]):
            logits = model(tokens[:, n : n + 1], state=state)[:, -1]
            logits.argmax(-1)
        return logits

    return Side(turn, tokens[:, PROMPT:].numel())


def peer_decoding(model: Any, tokens: Tensor) -> Side:
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def turn() -> Tensor:
        for n in range(PROMPT, tokens.shape[1]):
            logits = model(input_ids=tokens[:, n : n + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            logits.argmax(-1)
        return logits

    return Side(turn, tokens[:, PROMPT:].numel())


OURS: dict[str, Callable[..., Side]] = {"train": our_training, "prefill": our_prefill, "decode": our_decoding}
TRANSFORMERS: dict[str, Callable[..., Side]] = {
    "train": peer_training,
    "prefill": peer_prefill,
    "decode": peer_decoding,
}


def side(sides: dict[str, Callable[..., Side]], case: str, dtype: str, model: Any, vocab: int) -> Side:
    """The turn of one case for ours or for transformers."""
    kind, tokens = case.split()[0], case_tokens(case, vocab)
    return sides[kind](model, tokens, dtype) if kind == "train" else sides[kind](model, tokens)


def load_transformers(folder: str, dtype: torch.dtype) -> Any:
    """transformers' own model from the folder that ours wrote."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model
