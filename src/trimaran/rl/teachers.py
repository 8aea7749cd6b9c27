"""What a teacher would have said: its log-probabilities of exactly the tokens that the student chose.

    A_t = log π_teacher(y_t | s_t) - log π_student(y_t | s_t)          no gradient, clipped

is the gain of a token as a step against the reverse KL from the student to the teacher, along the student's own texts;
the objective subtracts the student's own (see `objective.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.ops.logprobs import token_logprobs
from trimaran.rl.streams import Example, PolicyStreams, pack, unpack
from trimaran.text.template import NEMOTRON_3
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.loop import parts


class Teachers:
    """Frozen models by folder, opened when they are asked for the first time, at most `at_once` held (0: all).

    of: the folder that teaches an environment. row, pad_id: how their examples are packed; cuts: in how many
    parts the rows are read, as the trainer reads its own.
    """

    def __init__(
        self,
        of: Callable[[str], str],
        *,
        at_once: int,
        device: torch.device,
        row: int,
        pad_id: int,
        temperature: float,
        cuts: int = 1,
    ):
        self.of, self.at_once, self.device = of, at_once, device
        self.row, self.pad_id, self.temperature, self.cuts = row, pad_id, temperature, cuts
        self.open: OrderedDict[str, HybridModel] = OrderedDict()  # the one asked last at the end

    def __call__(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with their teachers' log-probabilities. Each teacher reads its own rows once."""
        found = list(examples)
        by_folder: dict[str, list[int]] = {}
        for place, one in enumerate(examples):
            by_folder.setdefault(self.of(one.rollout.environment), []).append(place)
        for folder, places in by_folder.items():
            mine = [examples[place] for place in places]
            streams = pack(mine, self.row, self.pad_id)
            # cut as the trainer cuts its step: a teacher that is the student then has its very numbers
            model, cut = self.model(folder), parts(streams, self.cuts)
            read_BT = torch.cat([self.read(model, one) for one in cut])
            for place, one, values in zip(places, mine, unpack(read_BT, streams, mine), strict=True):
                found[place] = replace(one, teacher=values)
        return found

    def read(self, model: HybridModel, part: PolicyStreams) -> Tensor:
        """Log-probabilities [B, T] of the chosen tokens under a frozen model, 0 elsewhere.

        Gradients stay on, although nothing here wants one: without them layers take paths that round otherwise.
        """
        part = part.to(self.device)
        counts_BT = part.weights_BT > 0
        hidden_MD = model.hidden(part.tokens_BT, part.doc_ids_BT)[counts_BT]
        logp_M = token_logprobs(hidden_MD, model.head, part.targets_BT[counts_BT], temperature=self.temperature)
        found_BT = logp_M.new_zeros(counts_BT.shape)
        found_BT[counts_BT] = logp_M
        return found_BT.cpu()

    def model(self, folder: str) -> HybridModel:
        """The model in `folder`; whichever was asked for longest ago makes room for it."""
        if folder not in self.open:
            while self.at_once and len(self.open) >= self.at_once:
                self.open.popitem(last=False)
            model = hub.load(folder, dtype=torch.float32, device=self.device)
            self.open[folder] = model.requires_grad_(False).eval()
        self.open.move_to_end(folder)
        return self.open[folder]


def check_teacher(folder: str, student: Tokenizer) -> None:
    """Refuses a teacher that spells texts otherwise than the student, or frames a conversation otherwise: its
    log-probabilities would be those of another text."""
    if not Path(folder).is_dir():
        raise Refusal(f"teacher {folder!r} is no folder", "a run or hub folder", "train one, or correct the path")
    teacher = Tokenizer.load(folder)
    if teacher.digest != student.digest:
        found = f"teacher {folder} has another tokenizer ({teacher.vocab_size} tokens)"
        raise Refusal(found, f"the student's own ({student.vocab_size} tokens)", "train it from the same start")
    if template_of(teacher) != template_of(student):
        found = f"teacher {folder} has another chat template"
        raise Refusal(found, "the student's own", "train it from the same start")
    size = hub.read_config(Path(folder)).vocab_size
    if size < student.vocab_size:
        found = f"teacher {folder} knows {size} tokens"
        raise Refusal(found, f"the tokenizer's {student.vocab_size}", "give a teacher with a vector for each")


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template that conversations are framed with."""
    return tokenizer.template or NEMOTRON_3.read_text(encoding="utf-8")
