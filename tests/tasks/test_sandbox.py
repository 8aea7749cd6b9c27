"""Attacks, each contained, and the host looked at afterwards: as the user who runs the tests and, where that is root,
as an ordinary user too."""

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tasks.ordinary import ROOT, Ordinary
from trimaran.errors import Refusal
from trimaran.tasks import sandbox
from trimaran.tasks.sandbox import Limits

SHORT = Limits(cpu_seconds=1, wall_seconds=0.6)


def why_not() -> str:
    """Why this machine has no namespaces for us, or nothing."""
    try:
        sandbox.run("pass")
    except Refusal as refusal:
        return refusal.found
    return ""


@pytest.fixture(scope="module")
def ordinary():
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already")
    if reason := why_not():
        pytest.skip(reason)
    user = Ordinary()
    yield user
    user.close()


@pytest.fixture(params=["me", "ordinary"])
def run(request):
    if request.param == "ordinary":
        return request.getfixturevalue("ordinary")
    if reason := why_not():
        pytest.skip(reason)
    return sandbox.run


@pytest.fixture
def walls():
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def mark():
    """A name of a process that its children inherit, and that no other process has."""
    return secrets.token_hex(6)


def marked(mark: str) -> str:
    """Source that gives a process that name (PR_SET_NAME)."""
    return f"import ctypes, os, sys, time\nctypes.CDLL(None).prctl(15, {mark.encode()!r}, 0, 0, 0)\n"


def bearers(mark: str) -> list[int]:
    """Living processes of this name anywhere on the host."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == mark:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def soon(condition, seconds=10) -> bool:
    """Whether it comes true; a killed process takes a moment to vanish."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def tried(*attempts: str) -> str:
    """Source that carries out each attempt and prints the list of those that raised nothing."""
    return f"""
import ctypes, errno, os, shutil, signal, socket, sys
done = []
for attempt in {list(attempts)!r}:
    try:
        exec(attempt)
    except OSError as problem:
        print(attempt, problem, file=sys.stderr)
    else:
        done.append(attempt)
print(done)
"""


def test_a_program_reads_computes_and_says(run):
    ran = run(
        "import os, sys\nprint(input()[::-1])\nprint('é', file=sys.stderr)\nos.write(3, b'[1]')\nsys.exit(3)", "tar"
    )
    assert (ran.stdout, ran.stderr, ran.reply, ran.exit, ran.limit) == ("rat\n", "é\n", "[1]", 3, "")
    assert not ran.timed_out and not ran.memory_exceeded


def test_the_whole_standard_library_is_there_and_nothing_else(run):
    ran = run("""
import bz2, ctypes, decimal, hashlib, lzma, multiprocessing, socket, sqlite3, ssl, subprocess, sys, threading, zlib
import importlib.util
thread = threading.Thread(target=print, args=("thread",))
thread.start(); thread.join()
print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True).stdout)
print(sqlite3.connect(":memory:").execute("select 1").fetchall(), exit)
print([name for name in ("numpy", "torch", "trimaran", "pip") if importlib.util.find_spec(name)])
""")
    assert ran.stdout.splitlines()[:2] == ["thread", "b'42\\n'"] and ran.stdout.endswith("\n[]\n"), ran


def test_the_world_is_empty(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    ran = run("""
import json, os, sys
def open_ones():
    for number in range(64):
        try: os.fstat(number)
        except OSError: continue
        yield number
files = [os.path.join(folder, name) for folder, _, names in os.walk("/") for name in names]
outside = [f for f in files if not f.startswith((os.path.dirname(os.__file__), "/dev/", "/tmp/")) and ".so" not in f]
print(json.dumps([dict(os.environ), list(open_ones()), os.getpid(), os.listdir(), os.uname().nodename, outside,
                  sorted(f for f in files if f.startswith("/dev"))]))
""")
    environment, descriptors, number, here, host, outside, devices = json.loads(ran.stdout)
    assert (environment, descriptors, number, here, host) == ({}, [0, 1, 2, 3], 2, ["main.py"], "sandbox")
    assert [path for path in outside if "/bin/python" not in path] in ([], ["/etc/ld.so.cache"])
    assert devices == ["/dev/null", "/dev/urandom", "/dev/zero"]


def test_a_fork_bomb_ends(run, mark):
    ran = run(marked(mark) + "while True:\n  try: os.fork()\n  except OSError: pass", limits=SHORT)
    assert ran.timed_out and soon(lambda: not bearers(mark))


def test_processes_are_counted_per_program(run):
    counting = (
        "import os, time\nfor n in range(99):\n  try:\n    if not os.fork(): time.sleep(9)\n  except OSError: break"
    )
    source = counting + "\nprint(n)"
    with ThreadPoolExecutor(3) as pool:
        runs = pool.map(lambda _: sandbox.run(source), range(3)) if run is sandbox.run else [run(source)]
        assert {ran.stdout for ran in runs} == {"15\n"}


def test_an_endless_loop_ends(run):
    ran = run("while True: pass", limits=SHORT.replace(wall_seconds=9))
    assert (ran.limit, ran.timed_out, ran.exit) == ("cpu", True, -signal.SIGXCPU) and ran.cpu_seconds < 3


@pytest.mark.slow
def test_many_loops_share_one_allowance(run):
    ran = run("import os\n[os.fork() for _ in range(3)]\nwhile True: pass", limits=SHORT.replace(wall_seconds=9))
    assert ran.limit == "cpu" and ran.cpu_seconds < 4


@pytest.mark.slow
def test_who_ignores_the_warning_is_killed(run):
    loop = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    ran = run(loop, limits=SHORT.replace(wall_seconds=9))
    assert ran.exit == -signal.SIGKILL and ran.cpu_seconds < 4


def test_a_sleeper_ends(run, mark):
    ran = run(marked(mark) + "time.sleep(60)", limits=SHORT)
    assert ran.limit == "wall" and ran.timed_out and soon(lambda: not bearers(mark))


def test_ten_gigabytes_are_not_to_be_had(run):
    ran = run("block = bytearray(10 << 30)\nprint('had')")
    assert ran.memory_exceeded and ran.exit == 1 and not ran.stdout


def test_nor_in_small_pieces_by_many(run):
    source = "import os, time\n[os.fork() for _ in range(3)]\nblock = b'1' * (60 << 20)\ntime.sleep(5)"
    ran = run(source, limits=Limits(memory_megabytes=256))
    assert ran.limit == "memory" and ran.memory_exceeded


def test_nor_where_no_limit_counts_it(run):
    calls = [
        "os.memfd_create('x')",
        "assert_ = [].index(0) if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) != -1 else os.stat('/gone')",
    ]
    assert run(tried(*calls)).stdout == "[]\n"


def test_the_disk_is_small(run):
    ran = run("""
def fill(name, size):
    with open(name, "wb", buffering=0) as file:
        while size > 0: size -= file.write(bytes(1 << 20))
for attempt in ("fill('one', 20 << 20)", "[fill(str(n), 4 << 20) for n in range(20)]",
                "[open(f'e{n}', 'w').close() for n in range(9999)]"):
    try: exec(attempt)
    except OSError as problem: print(problem.errno)
""")
    assert ran.stdout.split() == ["27", "28", "28"]  # EFBIG, ENOSPC, ENOSPC


def test_nothing_outside_is_written_or_read(run, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("sings")
    canary.chmod(0o666)
    library = Path(sysconfig.get_path("stdlib"))
    before = sorted(os.listdir(library))
    targets = [
        str(canary),
        str(tmp_path / "new"),
        str(Path.home() / "new"),
        str(library / "new.py"),
        "/new",
        str(library / "os.py"),
        str(Path(sys.prefix) / "new"),
        sys.executable,
        "/dev/new",
        "/etc/ld.so.cache",
    ]
    reads = [
        "/etc/passwd",
        "/etc/shadow",
        f"/proc/{os.getpid()}/environ",
        "/proc/self/environ",
        str(canary),
        "/proc/1/root",
        str(ROOT),
        str(Path.home() / ".bashrc"),
        "../../../etc/passwd",
        "/sys",
        "/dev/kmsg",
        "/dev/shm",
        "/dev/vda",
        "/run",
    ]
    attempts = [f"open({place!r}, 'a')" for place in targets] + [f"os.stat({place!r})" for place in reads]
    attempts += ["os.mknod('disk', 0o60666, os.makedev(254, 0))"]
    attempts += [f"os.symlink({place!r}, 'link{n}'), os.stat('link{n}')" for n, place in enumerate(reads)]
    assert run(tried(*attempts)).stdout == "[]\n"
    assert canary.read_text() == "sings" and os.listdir(tmp_path) == ["canary"]
    assert sorted(os.listdir(library)) == before


def test_all_but_the_box_is_mounted_read_only(run):
    """Whoever owns the interpreter could write to it otherwise. Devices stay what they are."""
    ran = run("""
import os
for folder, _, names in os.walk("/"):
    for path in (folder, *(os.path.join(folder, name) for name in names)):
        flags = os.statvfs(path).f_flag
        if not flags & os.ST_NOSUID or not flags & os.ST_RDONLY and not path.startswith("/tmp"):
            print(path)
flags = os.statvfs("/tmp").f_flag
assert flags & os.ST_NODEV and flags & os.ST_NOEXEC
open("/dev/null", "w").write("x")
""")
    assert (ran.stdout, ran.exit) == ("", 0), ran


def test_powers_do_not_come_back(run):
    quiet = "ctypes.CDLL(None, use_errno=True).{}({}) == -1 and os.stat('/gone')"
    calls = [
        ("unshare", 0x10000000),
        ("unshare", 0x20000),
        ("setns", "0, 0"),
        ("ptrace", "16, 1, 0, 0"),
        ("mount", "b'x', b'/tmp', b'tmpfs', 0, 0"),
        ("umount", "b'/tmp'"),
        ("chroot", "b'/tmp'"),
        ("sethostname", "b'me', 2"),
        ("klogctl", "3, 0, 0"),
        ("personality", 0x40000),
    ]
    attempts = [quiet.format(*call) for call in calls]
    attempts += [
        "os.setuid(0)",
        "os.setgroups([0])",
        "os.chroot('/tmp')",
        "os.nice(-5)",
        "os.sched_setscheduler(0, 1, os.sched_param(1))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ]
    ran = run(tried(*attempts).replace("except OSError", "except (OSError, ValueError)"))
    assert ran.stdout == "[]\n", ran
    state = "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))"
    assert run(state).stdout == "1 2\n"  # no new privileges, a filter of system calls


def test_nobody_hears_from_the_program(run, tmp_path):
    name = f"\0{secrets.token_hex(8)}"
    path = str(tmp_path / "door")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as local,
    ):
        abstract.bind(name)
        local.bind(path)
        for door in (abstract, local):
            door.listen()
        port = listener.getsockname()[1]
        families = (socket.AF_INET, socket.AF_INET6, 16, 17, 38, 40)  # netlink, packet, crypto, vsock
        attempts = [f"socket.socket({int(family)}, socket.SOCK_DGRAM)" for family in families]
        attempts += [f"socket.create_connection(('127.0.0.1', {port}))", "socket.getaddrinfo('localhost.example', 80)"]
        attempts += [f"socket.socket(socket.AF_UNIX).connect({door!r})" for door in (name, path)]
        assert run(tried(*attempts)).stdout == "[]\n"
        for door in (listener, abstract, local):
            door.setblocking(False)
            with pytest.raises(BlockingIOError):
                door.accept()


@pytest.mark.parametrize("descriptor", [1, 2, 3])
def test_a_flood_is_cut_off(run, descriptor):
    ran = run(f"import os\nwhile True: os.write({descriptor}, b'x' * 65536)", limits=Limits(output_kilobytes=4))
    assert ran.limit == "output" and [len(ran.stdout), len(ran.stderr), len(ran.reply)][descriptor - 1] == 4096


@pytest.mark.slow
def test_deep_recursion_ends_in_itself(run):
    ran = run("import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)", limits=Limits(cpu_seconds=1))
    assert ran.exit != 0
    # repr goes down in C
    ran = run("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)")
    assert ran.exit != 0


def test_signals_reach_nobody(run):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        kills = [f"os.kill({os.getpid()}, signal.SIGTERM)", f"os.killpg({os.getpgid(0)}, signal.SIGTERM)"]
        ran = run(
            tried(*kills) + "\nos.kill(1, signal.SIGKILL), os.kill(1, signal.SIGTERM), os.kill(1, signal.SIGINT)\n"
            "print('alive')\nos.kill(-1, signal.SIGKILL)"
        )
        assert ran.stdout == "[]\nalive\n" and not heard
    finally:
        signal.signal(signal.SIGTERM, before)


def test_who_ends_the_keeper_ends_with_it(run, mark):
    ran = run(marked(mark) + "import signal\nos.kill(1, signal.SIGALRM)\ntime.sleep(9)\nprint('still')")
    assert ran.exit == -signal.SIGKILL and not ran.stdout and soon(lambda: not bearers(mark))


def test_grandchildren_do_not_outlive(run, mark):
    daemon = "if not os.fork():\n  os.setsid()\n  if not os.fork():\n    time.sleep(60)\n  os._exit(0)\nprint('left')"
    ran = run(marked(mark) + daemon)
    assert ran.stdout == "left\n" and ran.exit == 0 and not ran.limit and soon(lambda: not bearers(mark))


def test_no_zombies_are_left(walls):
    for _ in range(2):
        sandbox.run("import os\nfor _ in range(5):\n  os.fork()")
    threads = Path("/proc/self/task").glob("*/children")
    children = [Path(f"/proc/{child}/stat").read_text() for file in threads for child in file.read_text().split()]
    assert not [stat for stat in children if stat.rpartition(")")[2].split()[0] == "Z"]


def test_programs_side_by_side_do_not_meet(walls):
    source = "import os, time\nopen('note', 'w').write({!r})\ntime.sleep(0.2)\nprint(open('note').read(), os.listdir())"
    with ThreadPoolExecutor(6) as pool:
        runs = list(pool.map(lambda n: sandbox.run(source.format(str(n))), range(6)))
    assert [ran.stdout.split()[0] for ran in runs] == [str(n) for n in range(6)]


def test_when_the_guard_is_killed_everything_goes(walls, mark):
    outcome = []

    def caller():
        try:
            sandbox.run(marked(mark) + "time.sleep(60)", limits=Limits(wall_seconds=60))
        except RuntimeError as problem:
            outcome.append(str(problem))

    thread = threading.Thread(target=caller)
    thread.start()
    assert soon(lambda: bearers(mark))
    program = bearers(mark)[0]
    for _ in range(2):  # up from the program: keeper, guard
        program = int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(program, signal.SIGKILL)
    thread.join(20)
    assert "exit -9" in outcome[0] and soon(lambda: not bearers(mark))


def test_when_the_caller_is_killed_everything_goes(walls, mark):
    program, limits = marked(mark) + "time.sleep(60)", "limits=sandbox.Limits(wall_seconds=60)"
    source = f"from trimaran.tasks import sandbox\nsandbox.run({program!r}, {limits})"
    caller = subprocess.Popen([sys.executable, "-c", source])
    assert soon(lambda: bearers(mark))
    caller.kill()
    caller.wait()
    assert soon(lambda: not bearers(mark))


REFUSED = """
from trimaran.errors import Refusal
from trimaran.tasks import sandbox, seccomp
seccomp.apply()  # as a kernel that gives no namespaces
try:
    sandbox.run("print(1)")
except Refusal as refusal:
    print(refusal)
print(sandbox.run("print(1)", isolation="weak").stdout)
"""


def test_without_namespaces_it_refuses_unless_weak_is_named():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=60)
    refusal, weak = done.stdout.splitlines()[:2]
    assert "unshare(): Operation not permitted" in refusal and 'isolation = "weak"' in refusal
    assert weak == "1"


def test_weak_has_limits_and_is_weak(tmp_path, monkeypatch, mark):
    monkeypatch.setenv("SECRET", "hush")
    (tmp_path / "note").write_text("readable")
    place = str(tmp_path / "note")
    ran = sandbox.run(f"import os\nprint(os.getenv('SECRET'), os.listdir(), open({place!r}).read())", isolation="weak")
    assert ran.stdout == "None ['main.py'] readable\n"
    ran = sandbox.run(marked(mark) + "os.fork()\ntime.sleep(60)", limits=SHORT, isolation="weak")
    assert ran.limit == "wall" and soon(lambda: not bearers(mark))
    assert sandbox.run("x = bytearray(10 << 30)", isolation="weak").memory_exceeded
    # A box full of links is emptied without following them.
    ran = sandbox.run(f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nprint(os.getcwd())", isolation="weak")
    assert os.listdir(tmp_path) == ["note"] and not os.path.exists(ran.stdout.strip())


def test_calls_give_values_and_failures():
    source = "def f(x):\n  print('noise')\n  if x == 2: raise KeyError(x)\n  return [x, {'a': x / 2}]"
    if why_not():
        pytest.skip(why_not())
    values, ran = sandbox.call(source, "f", [[1], [2], [3]])
    assert [(one.returned, one.value) for one in values] == [
        (True, [1, {"a": 0.5}]),
        (False, None),
        (True, [3, {"a": 1.5}]),
    ]
    assert "KeyError" in ran.stderr


def test_the_c_library_sees_what_python_passes():
    assert ctypes.sizeof(ctypes.c_void_p) == 8, "the filter reads the low half of 64-bit arguments"


def test_a_second_way_into_the_kernel_is_shut(run):
    if os.uname().machine != "x86_64":
        pytest.skip("x32 is of x86_64")
    assert run("import ctypes\nctypes.CDLL(None).syscall(0x40000027)").exit == -signal.SIGSYS


def test_what_does_not_fit_is_refused():
    with pytest.raises(Refusal, match=r"limits\.disk_megabytes"):
        sandbox.run("pass", "x" * (1 << 20), Limits(disk_megabytes=1))


def test_what_the_caller_ignores_and_blocks_is_not_inherited(walls):
    source = """
import signal
from trimaran.tasks.sandbox import Limits, run
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
interpreter = run("pass")
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
ran = run("import signal\\nprint(signal.pthread_sigmask(0, []), signal.getsignal(signal.SIGXCPU).name)")
print(ran.exit, ran.stdout)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 set() SIG_DFL", done
