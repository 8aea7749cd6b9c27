"""From one command to all processes of a layout, and out again.

`start` runs torch's elastic launcher on this machine with one process per rank. On a cluster torchrun does the same on
every node, and `carry_out` is then inside one of its processes: RANK and WORLD_SIZE are set. There each process has
`joined` the others, works, and leaves by os._exit, for torch with gloo now and then aborts while the interpreter
closes, after all work is done.

What ends a run early. A signal: all finish their step, save, and leave (train/loop). A refusal, a fault or the death
of one process: the launcher ends the others; those that wait in an exchange see their connection break, or give up
after `timeout` seconds. One line says why: of a refusal the process that comes first, of a death the launcher.
"""

import contextlib
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join

T = TypeVar("T")
LAUNCHER = "TRIMARAN_LAUNCHER"  # id of the process that started this one
REFUSED, LOST = 2, 75  # exit codes; LOST: another process was at fault (EX_TEMPFAIL)
GRACE = "300"  # seconds for the last step and its save after a signal
PREPARING = timedelta(days=2)  # as long as the first process may take over text that all need
BROKEN = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "timed out", "Timed out")


def carry_out(settings: ParallelSettings, words: Sequence[str], work: Callable[[], int]) -> int:
    """Does `work` in every process of the layout; returns the exit code, or leaves with it.

    words: of the command line behind `trimaran`, with which the processes are started where this is none of them.
    """
    if "RANK" in os.environ:
        leave(ended(work))
    return work() if settings.world == 1 else start(settings.world, words)


# in the process that a person starts


def start(processes: int, words: Sequence[str]) -> int:
    """Runs `trimaran WORDS` in so many processes on this machine; returns their exit code, the cause said in a line."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        found = f"{processes} processes on a machine with {torch.cuda.device_count()} GPUs"
        raise Refusal(found, "one GPU for each", "start torchrun on several machines, or change [parallel]")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for talker in ("multiprocessing.api", "agent.server.api"):  # each ended process twice, and once more below
        logging.getLogger(f"torch.distributed.elastic.{talker}").setLevel(logging.CRITICAL)
    os.environ |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE, "OMP_NUM_THREADS": "1"} | os.environ
    os.environ[LAUNCHER] = str(os.getpid())
    here = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    sizes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": processes, "max_restarts": 0}
    launch = elastic_launch(LaunchConfig(**sizes, **here, run_id=str(uuid.uuid4())), sys.executable)  # type: ignore[arg-type]
    try:
        launch("-m", "trimaran", *words)
    except SignalException as heard:
        return 128 + int(heard.sigval)
    except ChildFailedError as problem:
        return told(problem.failures)
    return 0


def told(failures: dict[int, Any]) -> int:
    """The exit code of the process that failed first, and a line that says so where it could not say it itself.

    failures: rank -> torch's ProcessFailure.
    """

    def blame(rank: int) -> tuple[bool, bool, int]:
        code = failures[rank].exitcode
        return (code == LOST, code in (-signal.SIGTERM, 128 + signal.SIGTERM), rank)

    rank = min(failures, key=blame)
    failure = failures[rank]
    code = failure.exitcode
    if code < 0:
        code = 128 - code
        cause = f"process {rank} (pid {failure.pid}) was killed by {signal.Signals(code - 128).name}"
    elif code == LOST:
        cause = f"process {rank} waited for another one in vain ({failure.message})"
    else:  # it has said why, or was asked to stop
        return int(code)
    print(f"trimaran: {cause}; the same command goes on from the last checkpoint", file=sys.stderr)
    return int(code)


# in one of the processes


def ended(work: Callable[[], int]) -> int:
    """The exit code of `work`. A refusal that all processes meet is printed by one."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        return work()
    except Refusal as problem:
        if before_others():
            print("trimaran: " + " ".join(str(problem).split()), file=sys.stderr)
        return REFUSED
    except RuntimeError as problem:
        if not isinstance(problem, dist.DistError) and not any(sign in str(problem) for sign in BROKEN):
            raise
        get_error_handler().record_exception(problem)  # for the launcher, who knows more
        return LOST


def before_others() -> bool:
    """Whether no other process has asked this; True where they cannot be reached."""
    try:
        wait = timedelta(seconds=5)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=wait)
        return store.add(f"trimaran/refused/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except dist.DistError:
        return True


def leave(code: int) -> NoReturn:
    """Ends this process now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(settings: ParallelSettings, device: torch.device) -> Iterator[World]:
    """This process among the others, each with a device of its own kind; the first alone prints.

    Raises Refusal where there are more or fewer of them than the layout has.
    """
    if "RANK" not in os.environ:
        yield join(settings, device)
        return
    if int(os.environ["WORLD_SIZE"]) == settings.world == 1:
        yield World(settings, device)
        return
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    wait = timedelta(seconds=settings.timeout)
    store, rank, size = next(rendezvous("env://", timeout=wait))
    dist.init_process_group(backend, timeout=wait, store=own_part(store, rank, size, wait), rank=rank, world_size=size)
    with contextlib.ExitStack() as stack:
        if dist.get_rank() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield join(settings, device)
        dist.barrier()
        dist.destroy_process_group()


def own_part(store: dist.Store, rank: int, size: int, wait: timedelta) -> dist.Store:
    """The part of a store that belongs to these processes, and to none that were started before them.

    torchrun keeps one store through its restarts, in which the addresses of the dead processes still stand (2.13), and
    machines do not agree on the number of a restart. So every process leaves a word of its own, the first one answers
    each with the name of the part, also if it finds a later one, and is done when all have used it.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"trimaran/word/{rank}", word)
        store.wait([f"trimaran/answer/{word}"], wait)
        part = store.get(f"trimaran/answer/{word}").decode()
        store.add(f"trimaran/here/{part}", 1)
        return dist.PrefixStore(part, store)
    answered, until = dict[int, str](), time.monotonic() + wait.total_seconds()
    while store.add(f"trimaran/here/{word}", 0) < size - 1:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"of {size} processes only {len(answered) + 1} came")
        for other in range(1, size):
            key = f"trimaran/word/{other}"
            if store.check([key]) and (theirs := store.get(key).decode()) != answered.get(other):
                store.set(f"trimaran/answer/{theirs}", word)
                answered[other] = theirs
        time.sleep(0.01)
    return dist.PrefixStore(word, store)


def in_turn(world: World, work: Callable[[], T]) -> T:
    """`work` in the first process, then in the others, which find what it has written. Its Refusal is everybody's."""
    if world.alone:
        return work()
    group = dist.new_group(backend="gloo", timeout=PREPARING)
    outcome: list[Refusal | None] = [None]
    found: list[T] = []
    if world.first:
        try:
            found.append(work())
        except Refusal as problem:
            outcome = [problem]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]
    return found[0] if found else work()


def orphaned() -> bool:
    """Whether the launcher that started this process is gone, as after a second Ctrl-C."""
    return LAUNCHER in os.environ and os.getppid() != int(os.environ[LAUNCHER])
