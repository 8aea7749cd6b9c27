"""How long text takes on its way to the model: reading, training the tokenizer, encoding, batches.

    python benchmarks/text.py [--json]

The text is the standard library of the running interpreter. Medians of three; refuses to report when a round trip of
the encoded text does not give the bytes that were read.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from trimaran.data.corpora import stdlib_source
from trimaran.data.loader import Loader
from trimaran.data.shards import write
from trimaran.text.tokenizer import Tokenizer

REPEATS = 3
VOCABULARY = 2048
BATCHES = 200


def timed(case: str, work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """A result row, wall and CPU seconds, and what the last run gave."""
    wall, cpu, value = [], [], None
    for _ in range(REPEATS):
        started, burnt = time.perf_counter(), time.process_time()
        value = work()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - burnt)
    seconds, cpu_s = round(statistics.median(wall), 3), round(statistics.median(cpu), 3)
    return {"case": case, "seconds": seconds, "cpu_s": cpu_s}, value


def measure() -> dict[str, Any]:
    rows = []
    row, (corpus, _) = timed("survey and hash the files", stdlib_source)
    rows.append(row)
    row, texts = timed("read", lambda: list(corpus.texts()))
    rows.append(row)
    row, tokenizer = timed(f"train BPE, vocabulary {VOCABULARY}", lambda: Tokenizer.train(texts, VOCABULARY))
    rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        places = iter(range(REPEATS))
        row, shards = timed("encode into shards", lambda: write(corpus, tokenizer, Path(folder, str(next(places)))))
        rows.append(row)
        if any(tokenizer.decode(shards.document(n)[1:-1]) != text for n, text in enumerate(texts)):
            raise SystemExit("the encoded text is not the text that was read: no times reported")
        loader = Loader(shards, sequence_length=256, batch_size=8)
        row, _ = timed(f"{BATCHES} batches of 8 x 256", lambda: [next(loader) for _ in range(BATCHES)])
        rows.append(row)
        size = {"bytes": shards.total_bytes, "tokens": shards.total_tokens, "documents": len(shards)}
    versions = {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
    return {"text": size | {"digest": corpus.digest}, "versions": versions, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    result = measure()
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['text']['bytes'] / 1e6:.2f} MB, {result['text']['tokens']} tokens")
    for row in result["rows"]:
        print(f"{row['seconds']:8.3f} s  {row['cpu_s']:8.3f} s CPU  {row['case']}")


if __name__ == "__main__":
    main()
