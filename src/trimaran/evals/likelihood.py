"""How likely a model finds given texts, and how it goes on from them: all that other people's harnesses ask of a model.

Words become ids as lm-eval's own models do it, so that its figures can be compared: white space at the end of a context
belongs to the continuation; both are encoded as one text, which is split after as many ids as the context has alone; a
text without a context stands behind the token that begins texts. Where a token spans the border, what is read here is
still that one text (lm-eval's models then lose or repeat letters). No text is cut: these models have no last position.

Shapes: B texts in a batch, T tokens, D width, M tokens of all continuations in a batch, V vocabulary. Texts of a batch
are padded on the right (document id -1, which updates nothing), so none of them feels the others.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimaran.engine.engine import Engine
from trimaran.engine.folder import Folder
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.ops.numbers import at_least_fp32
from trimaran.report import Progress

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]  # what is given, and the continuation
Found = tuple[float, bool]  # a continuation's log-probability, and whether it is the greedy one
CHUNK = 512  # places whose logits exist at once
LONGEST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one setting
SAID = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LONGEST)
TOKENS = 256  # of an answer where nothing is said, as in lm-eval


@torch.no_grad()
def likelihoods(model: HybridModel, pairs: Sequence[Pair], tokens: int = 1024) -> list[Found]:
    """For each pair the continuation's log-probability (natural, summed), and whether greedy decoding would give it.

    tokens: the most in one pass, padding included; a longer text has its own. Raises Refusal for empty ones.
    """
    if not all(given and more for given, more in pairs):
        raise Refusal("an empty continuation, or one of nothing", "a token before it, and one in it", "add one")
    found: dict[int, Found] = {}
    with Progress(len(pairs), label="likelihoods") as progress:
        for batch in batches([len(given) + len(more) - 1 for given, more in pairs], tokens):
            found.update(zip(batch, read(model, [pairs[place] for place in batch])))
            progress.update(len(found), tokens=sum(len(given) + len(more) for given, more in (pairs[i] for i in batch)))
    return [found[place] for place in range(len(pairs))]


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of texts that are read together, the longest first, with at most `tokens` places, or one text."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def read(model: HybridModel, pairs: Sequence[Pair]) -> list[Found]:
    """`likelihoods` of one batch."""
    tokens_BT, docs_BT = padded([(given + more)[:-1] for given, more in pairs], model.device)
    hidden_BTD = model.hidden(tokens_BT, docs_BT)
    # A token is foretold by the hidden vector of the one before it.
    hidden_MD = torch.cat([hidden_BTD[b, len(given) - 1 :][: len(more)] for b, (given, more) in enumerate(pairs)])
    more_M = torch.tensor([one for _, more in pairs for one in more], device=model.device)
    logprobs, greedy = list[Tensor](), list[Tensor]()
    for hidden_CD, more_C in zip(hidden_MD.split(CHUNK), more_M.split(CHUNK)):
        logits_CV = at_least_fp32(model.head(hidden_CD))
        logprobs.append(logits_CV.log_softmax(-1).gather(-1, more_C[:, None])[:, 0])
        greedy.append(logits_CV.argmax(-1) == more_C)
    lengths = [len(more) for _, more in pairs]
    each = zip(torch.cat(logprobs).double().split(lengths), torch.cat(greedy).split(lengths))
    return [(float(sums.sum()), bool(best.all())) for sums, best in each]


def padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and document ids [B, T], padded on the right."""
    longest = max(map(len, rows))
    tokens_BT = [[*row, *[0] * (longest - len(row))] for row in rows]
    docs_BT = [[0] * len(row) + [-1] * (longest - len(row)) for row in rows]
    return torch.tensor(tokens_BT, device=device), torch.tensor(docs_BT, device=device)


class Reader:
    """A folder's model, asked in words. tokens: the most that `likelihoods` reads in one pass."""

    def __init__(self, folder: Folder, settings: EngineSettings, tokens: int = 1024):
        self.model, self.tokenizer, self.tokens = folder.model, folder.tokenizer, tokens
        first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        self.begin = folder.lead  # before every context
        self.alone = folder.lead or (first,)  # before a text without one
        self.engine = Engine(folder.model, folder.tokenizer, settings)

    def pair(self, context: str, continuation: str) -> Pair:
        """Both as ids. Raises Refusal for a continuation without a letter."""
        kept = context.rstrip()
        if not kept:
            found = self.alone, tuple(self.tokenizer.encode(context + continuation))
        else:
            before, whole = self.tokenizer.encode(kept), self.tokenizer.encode(context + continuation)
            at = min(len(before), len(whole) - 1)  # where a merge spans both, the last token is the continuation's
            found = (*self.begin, *whole[:at]), tuple(whole[at:])
        if not continuation or not found[1]:
            raise Refusal(f"an empty continuation of {context[-40:]!r}", "at least a letter", "correct the task")
        return found

    def continuations(self, asked: Sequence[tuple[str, str]]) -> list[Found]:
        """For each (context, continuation) as `likelihoods`."""
        return likelihoods(self.model, [self.pair(*one) for one in asked], self.tokens)

    def texts(self, asked: Sequence[str]) -> list[float]:
        """Log-probabilities of whole texts, each read at once however long it is; 0 for a text without a letter."""
        said = [place for place, text in enumerate(asked) if text]
        pairs = [(self.alone, tuple(self.tokenizer.encode(asked[place]))) for place in said]
        found = dict(zip(said, likelihoods(self.model, pairs, self.tokens))) if pairs else {}
        return [found[place][0] if place in found else 0.0 for place in range(len(asked))]

    def until(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """How the model goes on from each context, with lm-eval's settings. A context that is asked several times is
        sampled anew each time."""
        before, requests = Counter[str](), list[Request]()
        for context, settings in asked:
            requests.append(self.request(context, settings, seed=before[context]))
            before[context] += 1
        with Progress(len(requests), label="generate") as progress:
            texts = list[str]()
            for output in self.engine.generate(requests):
                texts.append(output.text)
                progress.update(len(texts), tokens=len(output.tokens))
        return texts

    def request(self, context: str, settings: Mapping[str, Any], seed: int) -> Request:
        ids = self.tokenizer.encode(context)
        sampling = sampling_of(settings, self.tokenizer.controls).replace(seed=seed)
        ends = tuple(dict.fromkeys([*self.tokenizer.stop_ids, *sampling.stop_ids]))
        return Request((*(self.begin if ids else self.alone), *ids), sampling.replace(stop_ids=ends))


def sampling_of(settings: Mapping[str, Any], controls: Mapping[str, int]) -> Sampling:
    """lm-eval's settings of a generation as ours. Greedy unless `do_sample`, or a temperature without it, says so; an
    end that is a control token of the model's is that token. Raises Refusal for settings that mean nothing here."""
    given = {name: value for name, value in settings.items() if value is not None}
    if unknown := sorted(given.keys() - set(SAID)):
        raise Refusal(f"generation settings {', '.join(unknown)}", ", ".join(SAID), "leave them out of the task")
    longest = [given.pop(name) for name in LONGEST if name in given]
    if len(set(longest)) > 1:
        raise Refusal(f"{len(longest)} lengths of an answer: {longest}", "one of " + ", ".join(LONGEST), "keep one")
    until = given.pop("until", ())
    ends = [until] if isinstance(until, str) else [end for end in until if end]
    temperature = float(given.pop("temperature", 0.0))
    return Sampling(
        temperature=temperature if given.pop("do_sample", temperature > 0) else 0.0,
        max_tokens=longest[0] if longest else TOKENS,
        stop=tuple(end for end in ends if end and end not in controls),
        stop_ids=tuple(controls[end] for end in ends if end in controls),
        **given,
    )
