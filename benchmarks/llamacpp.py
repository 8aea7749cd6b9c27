"""llama.cpp as a peer: fetched and built once into a cache folder, fed our weights, timed in turns with ours.

    python benchmarks/llamacpp.py [CACHE]          # fetches and builds alone, about ten minutes of two cores

The source is that of llama-cpp-python's source distribution, which carries llama.cpp whole. Its libraries are built for
this machine (GGML_NATIVE) with the tools llama-bench and llama-batched-bench. A hub folder becomes a GGUF file through
llama.cpp's own converter (llamacpp_convert.py). Turns are taken by a process that keeps the model open
(llamacpp_turns.py), so that both sides alternate, read the same tokens, and their logits can be compared; what
llama.cpp's own tools say about the same case is asked once and stands beside it.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_sides import PROMPT, Side
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer

VERSION = "0.3.36"  # of llama-cpp-python
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimaran"
TARGETS = ("llama", "llama-bench", "llama-batched-bench")
OFF = ("LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")
TYPES = {"fp32": "f32", "bf16": "bf16"}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Built:
    """Where a built llama.cpp lies: the unpacked source distribution, and its libraries and tools."""

    package: Path
    bin: Path

    @property
    def source(self) -> Path:
        return self.package / "vendor" / "llama.cpp"


def places(cache: Path) -> Built:
    root = cache / f"llama-cpp-{VERSION}"
    return Built(root / f"llama_cpp_python-{VERSION}", root / "tools" / "bin")


def installed(cache: Path = CACHE) -> Built | None:
    """The build in `cache`, if it was finished."""
    built = places(cache)
    return built if (built.bin.parent / "done").exists() else None


def install(cache: Path = CACHE, say: Callable[[str], None] = print) -> Built:
    """The build in `cache`; fetches and builds what is not there, telling what it does."""
    built = installed(cache)
    if built is not None:
        return built
    built = places(cache)
    check_tools()
    root = built.package.parent
    root.mkdir(parents=True, exist_ok=True)
    if not (built.source / "CMakeLists.txt").exists():
        say(f"llama.cpp: fetching llama-cpp-python {VERSION} (77 MB) into {root}")
        fetch(root)
    say(f"llama.cpp: building in {built.bin.parent}, once, about ten minutes of two cores")
    compile_in(built, say)
    (built.bin.parent / "done").touch()
    return built


def check_tools() -> None:
    """Refuses before anything is fetched when it could not be built."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    missing = [] if shutil.which("cmake") else ["cmake"]
    if not any(name and shutil.which(name) for name in compilers):
        missing.append("a C++ compiler")
    if missing:
        next_step = "install them (pip install cmake ninja; a compiler from your system), or leave llama.cpp out"
        raise Refusal(
            f"missing on the PATH: {' and '.join(missing)}", "cmake and a C++ compiler, to build llama.cpp", next_step
        )


def fetch(root: Path) -> None:
    wanted = ["llama-cpp-python==" + VERSION, "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(root)]
    run([sys.executable, "-m", "pip", "download", *wanted], root / "fetch.log")
    name = f"llama_cpp_python-{VERSION}"
    # Moved into place when whole: what an interrupted run left behind must not look like a source.
    with tempfile.TemporaryDirectory(dir=root) as place, tarfile.open(root / f"{name}.tar.gz") as packed:
        packed.extractall(place, filter="data")
        shutil.rmtree(root / name, ignore_errors=True)
        (Path(place) / name).rename(root / name)


def compile_in(built: Built, say: Callable[[str], None]) -> None:
    folder = built.bin.parent
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in OFF)]
    run(["cmake", "-S", str(built.source), "-B", str(folder), *generator, *flags], folder.parent / "configure.log")
    command = ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target", *TARGETS]
    log = folder.parent / "build.log"
    with (
        open(log, "w", encoding="utf-8") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as building,
    ):
        assert building.stdout is not None
        told = 0
        for line in building.stdout:
            kept.write(line)
            percent = progress(line)
            if percent is not None and percent >= told + 10:
                told = percent // 10 * 10
                say(f"llama.cpp: {told} % built")
    check(building.returncode, command, log)


def progress(line: str) -> int | None:
    """Percent done, by a line of ninja ("[12/143] …") or make ("[ 45%] …"); None for any other line."""
    head, _, _ = line.partition("]")
    if not head.startswith("["):
        return None
    done, slash, total = head[1:].strip().partition("/")
    if slash and done.isdigit() and total.isdigit() and int(total):
        return 100 * int(done) // int(total)
    return int(done[:-1]) if done.endswith("%") and done[:-1].strip().isdigit() else None


def run(command: list[str], log: Path) -> None:
    """Runs a command, its output kept in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as kept:
        code = subprocess.run(command, stdout=kept, stderr=subprocess.STDOUT).returncode
    check(code, command, log)


def check(code: int, command: list[str], log: Path) -> None:
    if code:
        end = " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-40:])
        raise Refusal(f"{' '.join(command[:4])} … failed: … {end}", "exit code 0", f"read {log}")


def convert(built: Built, folder: Path, dtype: str) -> Path:
    """FOLDER/model.gguf from a hub folder; a small tokenizer is written where there is none (speeds are of ids)."""
    if not (folder / "tokenizer.json").exists():
        Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 300).save(folder)
    out = folder / f"{TYPES[dtype]}.gguf"
    script = [sys.executable, str(HERE / "llamacpp_convert.py"), str(built.source), str(folder), str(out), TYPES[dtype]]
    run(script, folder / "convert.log")
    return out


class Turns:
    """The other process; closed at the end of a `with` block."""

    def __init__(self, built: Built, gguf: Path, threads: int):
        self.built, self.gguf, self.threads = built, gguf, threads
        self.out = gguf.with_suffix(".logits")
        words = [str(built.package), str(built.bin), str(gguf), str(threads)]
        script = [sys.executable, str(HERE / "llamacpp_turns.py"), *words]
        self.process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.newest = (0.0, 0.0)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *problem: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def ask(self, **asked: Any) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Refusal(f"llama.cpp ended with {self.process.wait()}", "an answer", f"try its tools on {self.gguf}")
        return json.loads(answer)

    def read(self, how: str, tokens: Tensor) -> Tensor:
        """The last logits of each row; `how` is feed or steps."""
        spent = self.ask(**{how: tokens.tolist(), "out": str(self.out)})
        self.newest = spent["wall"], spent["cpu"]
        logits = torch.frombuffer(bytearray(self.out.read_bytes()), dtype=torch.float32)
        return logits.view(len(tokens), -1)

    def side(self, case: str, tokens: Tensor, turns: int) -> Side:
        """The turn of a case, of which at most `turns` are taken."""
        rows, length = tokens.shape
        if case.startswith("prefill"):
            self.ask(open=[rows, length])

            def turn() -> Tensor:
                self.ask(clear=True)
                return self.read("feed", tokens)

            return Side(turn, tokens.numel(), lambda: self.newest)
        new = tokens[:, PROMPT:]
        self.ask(open=[rows, PROMPT + turns * new.shape[1]])
        self.read("feed", tokens[:, :PROMPT])
        return Side(lambda: self.read("steps", new), new.numel(), lambda: self.newest)

    def own_tool(self, case: str, tokens: Tensor) -> float | None:
        """Tokens per second as llama.cpp's own tool reports them for the same sizes (random tokens of its choice)."""
        rows, length = tokens.shape
        common = ["-m", str(self.gguf), "-t", str(self.threads)]
        if case.startswith("prefill"):
            tool, words = "llama-bench", ["-p", str(length), "-n", "0", "-r", "3", "-o", "json"]
        else:
            sizes = ["-npp", str(PROMPT), "-ntg", str(length - PROMPT), "-npl", str(rows), "-c", str(rows * length)]
            tool, words = "llama-batched-bench", [*sizes, "--output-format", "jsonl"]
        found = subprocess.run([str(self.built.bin / tool), *common, *words], capture_output=True, text=True)
        if found.returncode:
            raise Refusal(f"{tool} ended with {found.returncode}", "0", found.stderr[-300:])
        return tool_speed(found.stdout)


def tool_speed(text: str) -> float | None:
    """Tokens per second in what llama-bench (-o json) or llama-batched-bench (jsonl, its decoding) printed; None where
    the latter ended well without a line, as it does at times."""
    if text.lstrip().startswith("["):
        (test,) = json.loads(text)
        return sorted(test["samples_ts"])[len(test["samples_ts"]) // 2]
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[0])["speed_tg"] if lines else None


if __name__ == "__main__":
    install(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE)
