"""Python that nobody has read, run where it can spoil nothing: `run(source)`.

A fresh interpreter in its own user, mount, pid, network, IPC and host-name namespaces, behind limits and a filter of
system calls, with the standard library and one empty folder for a world. What comes back is data: bytes through
pipes, put into JSON by a process that the program cannot reach. docs/sandbox.md says what holds and what does not.
"""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.tasks.cell import BOX

Isolation = Literal["namespaces", "weak"]
Limit = Literal["", "cpu", "wall", "memory", "output"]

SOURCES = str(Path(__file__).resolve().parents[2])  # the folder of the package
START = "import sys; sys.path.append(sys.argv[1]); from trimaran.tasks.{0} import main; main()"
GRACE = 15  # s that the guard may take beyond the program's own limit


class Limits(Settings):
    """What a program may use. Memory: addresses of each process, and resident memory of all of them together."""

    cpu_seconds: int = Field(5, ge=1)
    wall_seconds: float = Field(10, gt=0)
    memory_megabytes: int = Field(512, ge=64)
    file_megabytes: int = Field(8, ge=0)
    disk_megabytes: int = Field(16, ge=1)
    processes: int = Field(16, ge=1)  # threads count as processes
    open_files: int = Field(64, ge=16)
    output_kilobytes: int = Field(64, ge=1)  # of stdout, of stderr, and of the reply


@dataclass(frozen=True)
class Ran:
    """How a program went.

    exit: what it exited with; -N: signal N ended it. reply: what it wrote to descriptor 3. limit: the limit that it was
    stopped at, if any. cpu_seconds: of all that ran inside, the few milliseconds that the walls took included.
    """

    stdout: str
    stderr: str
    reply: str
    exit: int
    limit: Limit
    wall_seconds: float
    cpu_seconds: float

    @property
    def timed_out(self) -> bool:
        return self.limit in ("cpu", "wall")

    @property
    def memory_exceeded(self) -> bool:
        """Stopped for its memory, or ended by a MemoryError: a note, since a program can print that word itself."""
        last = self.stderr.rstrip().rpartition("\n")[2]
        return self.limit == "memory" or (self.exit != 0 and last.startswith("MemoryError"))


@dataclass(frozen=True)
class Called:
    """What a call of a function gave: its value as JSON knows it, or nothing (`returned` False)."""

    returned: bool
    value: Any = None


def run(source: str, stdin: str = "", limits: Limits | None = None, isolation: Isolation = "namespaces") -> Ran:
    """Runs `source` as a program and returns when nothing of it is left.

    Raises Refusal where the kernel does not give this user the namespaces, unless isolation = "weak" was named: then
    limits, an empty environment and a session of its own are all there is, and files and network are open to it.
    """
    if sys.platform != "linux" and isolation == "namespaces":
        raise refused(f"{sys.platform} has none")
    limits = limits or Limits()
    size = len(source.encode(errors="surrogatepass")) + len(stdin.encode(errors="surrogatepass"))
    if size > limits.disk_megabytes << 19:
        half = f"{limits.disk_megabytes << 19} bytes, half of limits.disk_megabytes"
        raise Refusal(f"a program and its input of {size} bytes", half, "raise limits.disk_megabytes")
    job = {
        "source": source,
        "stdin": stdin,
        "limits": limits.model_dump(),
        "isolation": isolation,
        "interpreter": interpreter() if isolation == "namespaces" else {"executable": bare()},
    }
    # Weak isolation has no walls but a folder of its own, removed afterwards.
    with contextlib.nullcontext(BOX) if isolation == "namespaces" else TemporaryDirectory() as box:
        report = json.loads(inside("jail", json.dumps(job | {"box": box}), limits.wall_seconds + GRACE))
    if "refused" in report:
        raise refused(report["refused"])
    if "broken" in report:
        raise RuntimeError(f"the sandbox could not start a program: {report['broken']}")
    return Ran(**report)


def call(
    source: str,
    function: str,
    calls: Sequence[Sequence[Any]],
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> tuple[list[Called], Ran]:
    """Values of `function`, defined by `source`, for each list of arguments (JSON values), in turn in one process.

    Only arguments go in and only values come out. Who compares them outside with what they should be can not be
    talked into a verdict from within: there is nothing inside to print, patch or exit from that decides.
    """
    ran = run(HARNESS, json.dumps({"source": source, "function": function, "calls": calls}), limits, isolation)
    lines = ran.reply.split("\n")[:-1]  # what follows the last line end was cut off
    return [value_of(lines[number]) if number < len(lines) else Called(False) for number in range(len(calls))], ran


def value_of(line: str) -> Called:
    """One line of the harness: a list of one value, or an empty list for a call that failed."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):  # the program wrote there itself
        return Called(False)
    return Called(True, said[0]) if isinstance(said, list) and len(said) == 1 else Called(False)


HARNESS = """\
import json, os, sys
job = json.loads(sys.stdin.buffer.read())
space = {"__name__": "solution"}
exec(compile(job["source"], "solution.py", "exec"), space)
function = space[job["function"]]
for arguments in job["calls"]:
    try:
        line = json.dumps([function(*arguments)], allow_nan=False)
    except Exception as problem:
        print(type(problem).__name__, problem, file=sys.stderr)
        line = "[]"
    data = line.encode() + b"\\n"
    while data:
        data = data[os.write(3, data):]
"""


@functools.cache
def interpreter() -> dict[str, Any]:
    """What the interpreter that runs this needs of the file system (tasks/interpreter.py); asked once per process."""
    found: dict[str, Any] = json.loads(inside("interpreter", "", 60))
    return found


def inside(module: str, text: str, seconds: float) -> str:
    """What main() of a module of this room prints in a bare interpreter: no environment, no installed packages."""
    command = [bare(), "-I", "-S", "-c", START.format(module), SOURCES]
    done = subprocess.run(
        command, input=text, capture_output=True, encoding="utf-8", env={}, start_new_session=True, timeout=seconds
    )
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"the sandbox broke (exit {done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout


def bare() -> str:
    """The interpreter itself, where this one is a virtual environment's."""
    return str(getattr(sys, "_base_executable", sys.executable))


def refused(why: str) -> Refusal:
    return Refusal(
        f"no sandbox here: {why}",
        "a Linux kernel that gives this user namespaces of its own, and a filter of system calls",
        'allow them (docs/sandbox.md says how), or name isolation = "weak" for code that you trust',
    )
