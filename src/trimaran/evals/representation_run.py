"""`trimaran score RUN representation`: how much a model's layers still know of the order of a prefix, measured.

    trimaran score runs/text representation
    trimaran score runs/text representation path=book.txt lengths=[64,256,1024] samples=64

The same is measured on a freshly drawn model of the same shape: what training has changed is the distance between the
two. Each source of sequences (see representation_texts) of each model is kept as it is measured; the same command again
goes on where it was. Results, a table and a picture lie in RUN/scores/representation-DIGEST/.
"""

import json as as_json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from trimaran import config
from trimaran.config import Settings
from trimaran.data import corpora
from trimaran.engine.folder import Folder, FolderSettings, open_folder
from trimaran.errors import Refusal, writing
from trimaran.evals.interval import mean_interval
from trimaran.evals.records import digest_of, model_digest
from trimaran.evals.representation import Similarity, layer_names, measure
from trimaran.evals.representation_picture import picture
from trimaran.evals.representation_texts import Source, compressed_shares, sequences, windows
from trimaran.evals.suites import context_of
from trimaran.model.hybrid import HybridModel, build
from trimaran.report import Progress, environment, say

SCORES, RESULTS, PICTURE = "scores", "results.json", "representation.png"
APART = {"rows", "device"}  # settings that change no number


class RepresentationSettings(Settings):
    """What is read, and how often. Lengths count tokens of the prefix."""

    path: str | None = None  # text to read, a file or a folder; None: held-out packages of the standard library
    field: str = "text"
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256)
    suffix: int = Field(16, ge=1)  # tokens whose vectors are compared
    samples: int = Field(32, ge=2)  # sequences of each source
    shuffles: int = Field(1, ge=1)  # orders of each prefix
    sources: tuple[Source, ...] = ("text", "periodic", "noise")
    period: int = Field(32, ge=1)  # tokens of the repeated pattern
    untrained: bool = True  # also a freshly drawn model of the same shape
    seed: int = Field(0, ge=0)
    rows: int = Field(8, ge=1)  # sequences of a pass
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> "RepresentationSettings":
        if not self.lengths or self.lengths[0] < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise Refusal(f"lengths = {list(self.lengths)}", "rising numbers, 2 or more", "correct them")
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise Refusal(f"sources = {list(self.sources)}", "text, periodic, noise, each once", "correct them")
        return self


def main(target: str, overrides: Sequence[str] = (), json: bool = False) -> int:
    """Measures a folder's model, prints a table (or one JSON document) and draws the picture."""
    settings = config.load(RepresentationSettings, None, overrides)
    held = open_folder(target, FolderSettings(device=settings.device, dtype=settings.dtype))
    label = digest_of(settings=settings.model_dump(mode="json", exclude=APART), weights=model_digest(Path(target)))
    home = Path(target) / SCORES / f"representation-{label}"
    document = {"model": target, "trained_length": context_of(target).trained, **analysed(held, settings, home)}
    document |= {"settings": config.plain(settings), "made_on": environment()}
    write(home / RESULTS, document)
    picture(home / PICTURE, document)
    say(as_json.dumps(document, indent=1) if json else f"{table(document)}\nresults and picture in {home}")
    return 0


def analysed(held: Folder, settings: RepresentationSettings, home: Path | None = None) -> dict[str, Any]:
    """The layers, the lengths, and what was measured: by model ("trained", "untrained"), then by source, as `summary`
    gives it. home: where each part is kept once it is there; None: nowhere."""
    text_NT = windows(texts(settings), held.tokenizer, settings.samples, longest(settings), settings.seed)
    models: dict[str, Callable[[], HybridModel]] = {"trained": lambda: held.model}
    if settings.untrained:
        models["untrained"] = lambda: fresh(held.model, settings.seed)
    steps = len(models) * len(settings.sources)
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    with Progress(steps, label="representation") as progress:
        for number, (name, source) in enumerate([(name, source) for name in models for source in settings.sources], 1):
            part = None if home is None else home / f"{name}-{source}.json"
            if part is not None and part.exists():
                found[name][source] = as_json.loads(part.read_text(encoding="utf-8"))
                continue
            tokens_NT = sequences(source, text_NT, settings.period, settings.seed)
            found[name][source] = measured(models[name](), tokens_NT, held, settings)
            if part is not None:
                write(part, found[name][source])
            read = sum(settings.lengths) + len(settings.lengths) * (settings.suffix + len(held.lead))
            progress.update(number, tokens=settings.samples * read * (1 + settings.shuffles))
    return {
        "layers": layer_names(held.model),
        "lengths": list(settings.lengths),
        "measured": found,
    }


def texts(settings: RepresentationSettings) -> list[str]:
    """The documents to read. Raises Refusal for a path that is not there."""
    corpus = corpora.stdlib_source()[1] if settings.path is None else corpora.read(settings.path, field=settings.field)
    return list(corpus.texts())


def longest(settings: RepresentationSettings) -> int:
    return settings.lengths[-1] + settings.suffix


def fresh(model: HybridModel, seed: int) -> HybridModel:
    """A model of the same shape as nobody has trained it."""
    return build(model.config, model.device, model.dtype, seed).eval()


def measured(
    model: HybridModel, tokens_NT: np.ndarray, held: Folder, settings: RepresentationSettings
) -> dict[str, Any]:
    """One source through one model."""
    found = measure(
        model,
        torch.from_numpy(tokens_NT),
        settings.lengths,
        settings.suffix,
        lead=held.lead,
        shuffles=settings.shuffles,
        seed=settings.seed,
        rows=settings.rows,
    )
    shares = [compressed_shares(held.tokenizer, tokens_NT, length, settings.suffix) for length in settings.lengths]
    return summary(found, shares, settings.seed)


def summary(found: Similarity, shares_PN: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """As lists, by prefix length, then by layer. interval: 95 % of the mean over sequences (bootstrap), the anisotropy
    taken as known; places: ACCS of each place of the suffix after the longest prefix; sequences: each one's ACCS in the
    last layer there, with how compressible its prefix is."""
    accs_PNL = found.accs_PNL
    intervals = [[interval(of_N.tolist(), seed) for of_N in of_NL.T] for of_NL in accs_PNL]
    return {
        "self": found.self_PNLS.mean((1, 3)).tolist(),
        "anisotropy": found.aniso_PL.tolist(),
        "accs": found.accs_PL.tolist(),
        "scaled": found.scaled_PL.tolist(),
        "interval": intervals,
        "places": (found.self_PNLS[-1].mean(0) - found.aniso_PL[-1][:, None]).tolist(),
        "compressed": [float(np.mean(shares)) for shares in shares_PN],
        "sequences": {"compressed": list(shares_PN[-1]), "accs": accs_PNL[-1, :, -1].tolist()},
    }


def interval(of_N: Sequence[float], seed: int) -> tuple[float, float]:
    """Of a mean; of no width where all are equal, as those of the embedding are."""
    return (of_N[0], of_N[0]) if min(of_N) == max(of_N) else mean_interval(of_N, seed)


def table(document: dict[str, Any]) -> str:
    """ACCS of every layer after the longest prefix, by model and source."""
    columns = [(name, source) for name, parts in document["measured"].items() for source in parts]
    head = f"{'layer':<14}" + "".join(f"{f'{name} {source}':>20}" for name, source in columns)
    lines = [f"{document['model']}: ACCS after a prefix of {document['lengths'][-1]} tokens", head]
    for place, layer in enumerate(document["layers"]):
        values = [document["measured"][name][source]["accs"][-1][place] for name, source in columns]
        lines.append(f"{layer:<14}" + "".join(f"{value:>20.3f}" for value in values))
    shares = [document["measured"][name][source]["compressed"][-1] for name, source in columns]
    lines.append(f"{'LZMA ratio':<14}" + "".join(f"{share:>20.3f}" for share in shares))
    trained = document["trained_length"]
    lines.append(f"trained on rows of {trained} tokens" if trained else "no recipe says how long rows in training were")
    return "\n".join(lines)


def write(path: Path, document: dict[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(as_json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
