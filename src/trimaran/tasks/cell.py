"""The walls of the sandbox: namespaces, and a file system that holds an interpreter and one empty folder.

A caller that is root gives up being root on the way, after the file system stands; any other makes a user namespace
first and has its powers there alone. Either way the program ends up as nobody, in a user namespace of its own: so
the kernel counts its processes apart from everybody else's (Linux 5.14 and later). Standard library only.
"""

import contextlib
import ctypes
import os
from collections.abc import Sequence

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXECUTION = 1, 2, 4, 8  # MS_*, and the same bits of statvfs
KEPT = 1 | 2 | 4 | 8 | 1024 | 2048  # flags of a mount that a user namespace must not take off
REMOUNT, BIND, RECURSIVE, PRIVATE = 32, 4096, 16384, 1 << 18
DETACH = 2
NOBODY = 65534

ROOM = "/proc"  # where the new root is put together: a folder on every Linux, and nothing the program needs
BOX = "/tmp"  # the one place where the program can write
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def kernel(name: str, *arguments: object) -> None:
    """A call of the C library that answers 0. Raises OSError saying which call failed on what."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        about = ", ".join(os.fsdecode(value) for value in arguments if isinstance(value, bytes))
        raise OSError(code, f"{name}({about}): {os.strerror(code)}")


def leave(flags: int) -> None:
    """unshare(2): this process goes on in new namespaces."""
    kernel("unshare", ctypes.c_int(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    given = [os.fsencode(source), os.fsencode(target), kind.encode() if kind else None]
    kernel("mount", *given, ctypes.c_ulong(flags), options.encode() or None)


def enter() -> None:
    """Makes children of this process the first of a new pid namespace; one that is not root
    goes into a new user namespace, too."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        leave(NEWPID)
        return
    leave(NEWUSER | NEWPID)
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def close_off(paths: Sequence[str], hidden: Sequence[str], megabytes: int) -> None:
    """No network, no host name, and nothing of the file system but `paths`, read-only, and an empty `BOX`.

    hidden: folders below `paths` that look empty inside. Afterwards this process is not root any more.
    """
    leave(NEWNS | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
    kernel("sethostname", b"sandbox", ctypes.c_size_t(7))
    os.umask(0o022)
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", ROOM, "tmpfs", NO_SETUID | NO_DEVICES, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir(ROOM + BOX)  # before the rest: an interpreter may live below it
    flags = NO_SETUID | NO_DEVICES | NO_EXECUTION
    mount("tmpfs", ROOM + BOX, "tmpfs", flags, f"size={megabytes}m,nr_inodes=4096,mode=1777")
    for path in (*DEVICES, *paths):
        show(path)
    for folder in hidden:
        mount("tmpfs", ROOM + folder, "tmpfs", READ_ONLY | NO_SETUID | NO_DEVICES, "size=4k,nr_inodes=1,mode=555")
    os.chdir(ROOM)
    mount("none", ".", None, REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES)
    # The old root comes to lie on top of the new one, and goes: pivot_root(2), "pivot_root(".", ".")".
    pivot()
    kernel("umount2", b".", ctypes.c_int(DETACH))
    os.chdir(BOX)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def show(path: str) -> None:
    """Makes a file or folder of the host visible at the same path of the new root, read-only."""
    target = ROOM + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444))
    mount(path, target, None, BIND)
    kept = os.statvfs(target).f_flag & KEPT
    mount("none", target, None, kept | REMOUNT | BIND | READ_ONLY | NO_SETUID)


def pivot() -> None:
    """pivot_root(".", "."), which the C library has no name for."""
    number = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(ctypes.c_long(number), b".", b".") != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"pivot_root: {os.strerror(code)}")
