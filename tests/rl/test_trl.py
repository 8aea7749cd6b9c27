"""The loss and its gradient beside trl's GRPO, where the definitions coincide: token mean, clips, k3, ratios.

Ours differs from there on. trl compares a rollout with its whole group, ours leaves it out; trl may weigh its
divergence by the ratio of the clip, ours weighs it by the sampler's; the rules for that ratio are others.
"""

from dataclasses import replace

import pytest
import torch

from tests.models import tiny
from tests.rl.test_streams import drawn
from tests.train.runs import WORDS
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.rl.objective import PolicyGradient
from trimaran.rl.recipe import PolicySettings
from trimaran.rl.rollout import Rollout
from trimaran.rl.source import with_logprobs
from trimaran.rl.streams import Example, pack
from trimaran.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
CASES = {
    "clip and divergence": PolicySettings(importance="none", gate=None, kl=0.05, gap_limit=None),
    "sampler's ratios": PolicySettings(importance="tis", importance_range=(0.0, 1.1), gate=None, gap_limit=None),
}


def examples(model: HybridModel) -> list[Example]:
    """One answer each, all of whose tokens were chosen; streams near the model's own law, so that some are clipped."""
    plain = []
    for number, one in enumerate(drawn(6)):
        length = len(one.rollout.ids)
        said = tuple(range(max(1, length // 3), length))
        rollout = Rollout(
            "one", number, 0, number, one.rollout.ids, said, (0.0,) * len(said), 0, "stop", {"reward": 1.0}
        )
        plain.append(Example(rollout, one.advantage, 1.0))
    total = sum(len(one.rollout.said) for one in plain)
    generator = torch.Generator().manual_seed(0)
    found = []
    for one in with_logprobs(model, plain, "proximal", 64, 0, 1.0):
        near = [
            tuple((torch.tensor(one.proximal) + torch.randn(len(one.rollout.said), generator=generator) * 0.3).tolist())
            for _ in range(3)
        ]
        rollout = replace(one.rollout, logprobs=near[0])
        found.append(Example(rollout, one.advantage, 1 / total, near[1], near[2]))
    return found


def padded(rows: list[list[float]], left: bool, fill: float) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row)) for row in rows]
    )


def as_trl(found: list[Example], settings: PolicySettings) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right."""
    starts = [one.rollout.said[0] for one in found]
    prompts = [list(one.rollout.ids[:start]) for one, start in zip(found, starts)]
    answers = [list(one.rollout.ids[start:]) for one, start in zip(found, starts)]
    ratios = [
        (torch.tensor(one.proximal) - torch.tensor(one.rollout.logprobs)).exp().clamp(*settings.bounds).tolist()
        for one in found
    ]
    return {
        "prompt_ids": padded(prompts, True, 0),
        "prompt_mask": padded([[1] * len(one) for one in prompts], True, 0),
        "completion_ids": padded(answers, False, 0),
        "completion_mask": padded([[1] * len(one) for one in answers], False, 0),
        "advantages": torch.tensor([one.advantage for one in found]),
        "old_per_token_logps": padded([list(one.proximal or ()) for one in found], False, 0.0),
        "ref_per_token_logps": padded([list(one.reference or ()) for one in found], False, 0.0),
        "importance_sampling_ratio": padded(ratios, False, 0.0),
    }


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_trl_agrees(settings, tmp_path):
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    ours = tiny("llama", torch.float32, tie_embeddings=False)
    hub.save(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    Tokenizer.train([" ".join(WORDS)] * 3, 288).save(tmp_path / "tokenizer")
    trainer = trl.GRPOTrainer(
        theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=6,
            num_generations=2,
            loss_type="bnpo",
            beta=settings.kl,
            use_bias_correction_kl=False,
            epsilon=0.2,
            epsilon_high=0.28,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["sea", "hull"] * 3}),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = settings.importance == "tis"
    trainer.current_gradient_accumulation_steps = 1
    found = examples(ours)
    loss = trainer._compute_loss(theirs.train(), as_trl(found, settings))
    loss.backward()

    objective = PolicyGradient(ours.train(), settings)
    streams = pack(found if settings.kl else [replace(one, reference=None) for one in found], 64, 0)
    mine, reported = objective.terms(streams)
    mine.backward()
    assert reported["clipped"] > 0.02
    assert float(mine.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(ours.head.weight.grad, theirs.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
