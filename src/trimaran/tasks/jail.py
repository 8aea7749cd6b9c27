"""One program under guard: started by `sandbox.run` as a fresh interpreter, a job as JSON in, a report as JSON out.

Three processes. The guard (this one) watches pipes, clock, memory and processor time from outside of the walls. The
keeper is process 1 of a new pid namespace: when it ends, by itself or by the guard's hand, the kernel ends all that
lives there. The program is the keeper's child, and what it says can not pass for the keeper's word on how it ended:
that goes through a pipe which the program has not. Standard library only; nothing here runs in the caller's process.
"""

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from trimaran.tasks import cell, seccomp

PAUSE = 0.02  # s between two looks at clock and memory
PDEATHSIG, DUMPABLE = 1, 4  # prctl options
STREAMS = ("stdout", "stderr", "reply")
DRAUGHTS = 99  # reads that empty any pipes; in weak isolation somebody may be left who goes on filling them
FIRST_FREE = 20  # descriptors from here on are the keeper's own
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")

Job = dict[str, Any]


def main() -> None:
    """Reads a job, carries it out, writes the report."""
    for number in (signal.SIGCHLD, signal.SIGXCPU):  # what the caller ignores or blocks would be inherited
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    job = json.load(sys.stdin.buffer)
    walls = job["isolation"] == "namespaces"
    if sys.platform == "linux":
        seccomp.control(PDEATHSIG, int(signal.SIGKILL))
    json.dump(guard(job, walls, job["box"]), sys.stdout)


def guard(job: Job, walls: bool, box: str) -> dict[str, Any]:
    """Starts the keeper, watches, and puts the report together."""
    began = time.monotonic()
    if walls:
        try:
            cell.enter()
        except OSError as problem:
            return {"refused": str(problem)}
    ends = {name: os.pipe() for name in (*STREAMS, "word")}
    keeper = fork(lambda: keep(job, walls, box, {name: end[1] for name, end in ends.items()}))
    for _, writing in ends.values():
        os.close(writing)
    watch = Watch(keeper, walls, {name: end[0] for name, end in ends.items()}, job["limits"], began)
    watch.until_the_end()
    word = json.loads(watch.taken["word"] or b"{}")
    if "refused" in word or "broken" in word:
        return word
    said = {name: watch.taken[name].decode("utf-8", "replace") for name in STREAMS}
    # Without a word the keeper was killed, by the guard or with the program's help: so was the program.
    exit_code = word.get("exit", -int(signal.SIGKILL))
    limit = watch.limit or ("cpu" if exit_code == -signal.SIGXCPU else "")
    seconds = {"wall_seconds": time.monotonic() - began, "cpu_seconds": watch.cpu_seconds}
    return {**said, "exit": exit_code, "limit": limit, **seconds}


def fork(work: Callable[[], None]) -> int:
    """A child that does `work` and ends, whatever happens in it; its faults are on stderr."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)


class Watch:
    """The guard's eyes: reads what comes through the pipes, and kills the keeper when a limit is passed."""

    def __init__(self, keeper: int, walls: bool, ends: dict[str, int], limits: dict[str, int], began: float):
        self.keeper, self.walls, self.limits, self.began = keeper, walls, limits, began
        self.taken = {name: bytearray() for name in ends}
        self.limit, self.cpu_seconds = "", 0.0
        self.selector = selectors.DefaultSelector()
        self.word = ends["word"]
        for name, end in ends.items():
            os.set_blocking(end, False)
            self.selector.register(end, selectors.EVENT_READ, name)

    def until_the_end(self) -> None:
        """Returns when the keeper is gone, and with it, behind walls, all that it kept."""
        while self.word in self.selector.get_map():
            self.read(PAUSE)
            self.limit = self.limit or self.passed()
            if self.limit:
                self.kill()
        self.kill()
        used = os.wait4(self.keeper, 0)[2]
        self.cpu_seconds = used.ru_utime + used.ru_stime
        for _ in range(DRAUGHTS):
            if not self.read(0):
                break

    def read(self, seconds: float) -> bool:
        """Whether anything could be read. What passes the limit of output is read and dropped."""
        ready = self.selector.select(seconds)
        for key, _ in ready:
            with contextlib.suppress(BlockingIOError):
                piece = os.read(key.fd, 65536)
                if not piece:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)
                self.taken[key.data] += piece
            room = self.limits["output_kilobytes"] * 1024
            if key.data != "word" and len(self.taken[key.data]) > room:
                del self.taken[key.data][room:]
                self.limit = self.limit or "output"
        return bool(ready)

    def passed(self) -> str:
        """The limit that has been passed, or nothing. Memory: resident, of all processes together."""
        if time.monotonic() - self.began > self.limits["wall_seconds"]:
            return "wall"
        memory, seconds = usage(self.keeper)
        if seconds > self.limits["cpu_seconds"] + 1:  # each process's own limit goes first
            return "cpu"
        return "memory" if memory > self.limits["memory_megabytes"] << 20 else ""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.walls:
                os.kill(self.keeper, signal.SIGKILL)
            else:
                os.killpg(self.keeper, signal.SIGKILL)


def usage(keeper: int) -> tuple[int, float]:
    """(resident bytes, processor seconds) of the keeper's descendants, those that ended included in the seconds.

    0 and 0 where /proc does not say (proc(5): stat, task/[tid]/children).
    """
    memory, seconds = 0, 0.0
    for process in descendants(keeper):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            with open(f"/proc/{process}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if process != keeper:
                memory += int(fields[21]) * PAGE
                seconds += (int(fields[11]) + int(fields[12])) / TICK
            seconds += (int(fields[13]) + int(fields[14])) / TICK
    return memory, seconds


def descendants(process: int) -> Iterator[int]:
    """A process and all below it."""
    waiting = [process]
    while waiting:
        yield (parent := waiting.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    waiting += map(int, file.read().split())


def keep(job: Job, walls: bool, box: str, ends: dict[str, int]) -> None:
    """The keeper: builds the walls, starts the program, buries what dies, and says how the program ended."""
    os.setsid()
    # Should the guard be gone before it can say so: the keeper ends by its own clock.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which process 1 of a namespace never hears from inside
    signal.alarm(int(job["limits"]["wall_seconds"]) + 5)
    try:
        if walls:
            needs = job["interpreter"]
            cell.close_off(needs["paths"], needs["hidden"], job["limits"]["disk_megabytes"])
            seccomp.control(PDEATHSIG, int(signal.SIGKILL))  # forgotten by whom stops being root, so only now
            seccomp.control(DUMPABLE, 0)
        os.chdir(box)
        write("main.py", job["source"])
        write("stdin", job["stdin"])
    except OSError as problem:
        tell(ends["word"], {"refused" if walls else "broken": str(problem)})
        return
    program = fork(lambda: become(job, walls, ends))
    for name in STREAMS:
        os.close(ends[name])
    while True:
        child, status = os.wait()
        if child == program:
            break
    tell(ends["word"], {"exit": os.waitstatus_to_exitcode(status)})


def write(name: str, text: str) -> None:
    with open(name, "w", encoding="utf-8", newline="", errors="surrogatepass") as file:
        file.write(text)


def tell(end: int, word: dict[str, Any]) -> None:
    os.write(end, json.dumps(word).encode())


def become(job: Job, walls: bool, ends: dict[str, int]) -> NoReturn:
    """The program: gives up what is left to give up, and starts a new interpreter on its source.

    Descriptors: 0, 1, 2 and 3, the reply. The keeper's and the guard's close by themselves when the interpreter starts.
    """
    word = fcntl.fcntl(ends["word"], fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
    try:
        stdin = os.open("stdin", os.O_RDONLY)
        os.unlink("stdin")
        moved = [
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for end in (stdin, *(ends[name] for name in STREAMS))
        ]
        for number, end in enumerate(moved):
            os.dup2(end, number)
        if walls:
            cell.leave(cell.NEWUSER)
        confine(job["limits"])
        if walls:
            seccomp.apply()
        executable = job["interpreter"]["executable"]
        os.execve(executable, [executable, "-I", "-B", "-X", "utf8", "main.py"], {})
    except OSError as problem:
        tell(word, {"refused" if walls else "broken": str(problem)})
    os._exit(1)


def confine(limits: dict[str, int]) -> None:
    """The limits that the kernel keeps for each process (setrlimit(2)), never above those that stand already."""
    megabyte = 1 << 20
    bounds = {
        "CPU": (limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        "AS": (limits["memory_megabytes"] * megabyte,) * 2,
        "FSIZE": (limits["file_megabytes"] * megabyte,) * 2,
        "NPROC": (limits["processes"],) * 2,
        "NOFILE": (limits["open_files"],) * 2,
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
        "SIGPENDING": (64, 64),
    }
    for name, (soft, hard) in bounds.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            standing = resource.getrlimit(kind)[1]
            if standing != resource.RLIM_INFINITY:
                soft, hard = min(soft, standing), min(hard, standing)
            resource.setrlimit(kind, (soft, hard))
