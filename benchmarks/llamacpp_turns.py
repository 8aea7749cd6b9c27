"""llama.cpp's side of the turns: one process with one model, through the low-level bindings of llama-cpp-python.

    python llamacpp_turns.py BINDINGS LIBRARIES MODEL.gguf THREADS

A line of JSON comes in, one goes out, and only the work itself is timed, by wall clock and CPU time of this process:

    {"open": [sequences, tokens of each]}       a new context with llama.cpp's own defaults -> {}
    {"feed": [[ids], ...], "out": FILE}         a row of ids per sequence -> {"wall": s, "cpu": s}; the last logits
                                                of each row are written to FILE as float32
    {"steps": [[ids], ...], "out": FILE}        the same ids, one token of every sequence at a time
    {"clear": true}                             forgets what was fed -> {}
"""

import ctypes
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

BATCH = 2048  # tokens of one call, llama.cpp's default; it splits them further itself


def bindings(folder: str, libraries: str) -> Any:
    """The module of raw bindings alone: the package around it wants further packages."""
    os.environ["LLAMA_CPP_LIB_PATH"] = libraries
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(Path(folder) / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as raw

    return raw


class Peer:
    """A model and its context."""

    def __init__(self, raw: Any, path: str, threads: int):
        self.raw, self.threads = raw, threads
        self.silence = raw.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference to it
        raw.llama_log_set(self.silence, ctypes.c_void_p(0))
        raw.llama_backend_init()
        self.model = raw.llama_model_load_from_file(path.encode(), raw.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = raw.llama_vocab_n_tokens(raw.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch = raw.llama_batch_init(BATCH, 0, 1)
        self.at: list[int] = []

    def open(self, sequences: int, length: int) -> None:
        if self.context:
            self.raw.llama_free(self.context)
        params = self.raw.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = sequences * length, sequences, BATCH
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.raw.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {sequences} x {length} tokens")
        self.at = [0] * sequences

    def clear(self) -> None:
        self.raw.llama_memory_clear(self.raw.llama_get_memory(self.context), True)
        self.at = [0] * len(self.at)

    def decode(self, places: list[tuple[int, int, bool]]) -> list[int]:
        """One call: (sequence, id, are logits wanted). Returns the places of the wanted logits."""
        batch = self.batch
        batch.n_tokens = len(places)
        for n, (sequence, token, wanted) in enumerate(places):
            batch.token[n], batch.pos[n], batch.logits[n] = token, self.at[sequence], wanted
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            self.at[sequence] += 1
        code = self.raw.llama_decode(self.context, batch)
        if code:
            raise SystemExit(f"llama_decode says {code}")
        self.raw.llama_synchronize(self.context)
        return [n for n, place in enumerate(places) if place[2]]

    def logits(self, wanted: list[int]) -> bytes:
        rows = [self.raw.llama_get_logits_ith(self.context, n) for n in wanted]
        return b"".join(ctypes.string_at(row, 4 * self.vocab) for row in rows)

    def feed(self, rows: list[list[int]]) -> bytes:
        """Whole rows, as many tokens at once as a call takes."""
        places = [(row, token, n + 1 == len(ids)) for row, ids in enumerate(rows) for n, token in enumerate(ids)]
        found = b""
        for start in range(0, len(places), BATCH):
            found += self.logits(self.decode(places[start : start + BATCH]))
        return found

    def steps(self, rows: list[list[int]]) -> bytes:
        """A token of every row at a time; each step's logits are there, the last are returned."""
        for ids in zip(*rows):
            wanted = self.decode([(row, token, True) for row, token in enumerate(ids)])
        return self.logits(wanted)


def main() -> None:
    folder, libraries, path, threads = sys.argv[1:]
    peer = Peer(bindings(folder, libraries), path, int(threads))
    for line in sys.stdin:
        asked = json.loads(line)
        answer = {}
        if "open" in asked:
            peer.open(*asked["open"])
        elif "clear" in asked:
            peer.clear()
        else:
            started, burnt = time.perf_counter(), time.process_time()
            found = peer.feed(asked["feed"]) if "feed" in asked else peer.steps(asked["steps"])
            answer = {"wall": time.perf_counter() - started, "cpu": time.process_time() - burnt}
            Path(asked["out"]).write_bytes(found)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
