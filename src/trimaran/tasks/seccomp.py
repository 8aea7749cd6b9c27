"""A filter over system calls: what a program that only computes has no use for fails with EPERM.

Two kinds are left out: doors that have often led out of a namespace (ptrace, bpf, keyrings, io_uring, mounts,
namespaces of one's own), and memory that no limit of a process counts (memfd, System V shared memory). Sockets are of
AF_UNIX alone: not every address family belongs to a network namespace; vsock, which leads to a virtual machine's host,
does not.

The filter is classic BPF over `struct seccomp_data {int nr; u32 arch; u64 instruction_pointer; u64 args[6]}` (Linux,
include/uapi/linux/seccomp.h). Numbers are those of asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import errno
import platform
import struct

# machine -> (AUDIT_ARCH_*, column of CALLS)
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "pidfd_getfd": (438, 438),
    "personality": (135, 92),
    "syslog": (103, 116),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
X32 = 0x40000000  # the second way into an x86_64 kernel, with numbers of its own
AF_UNIX = 1

NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data; the low half of an argument comes first
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2


class Filter(ctypes.Structure):
    """struct sock_fprog: how many instructions of eight bytes, and where they are."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def program(machine: str) -> bytes:
    """The filter's instructions for a machine of `MACHINES`."""
    architecture, column = MACHINES[machine]
    out = [
        *((LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)),
        (LOAD, 0, 0, NUMBER),
        *((AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)),
        # The C library takes ENOSYS for an old kernel and falls back on clone, whose flags can be read here.
        *((EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERROR | errno.ENOSYS)),
    ]
    for numbers in CALLS.values():
        out += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERROR | errno.EPERM)]
    out += [
        *((EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES)),
        *((RETURN, 0, 0, ERROR | errno.EPERM), (RETURN, 0, 0, ALLOW)),
        *((EQUAL, 1, 0, SOCKETPAIR[column]), (EQUAL, 0, 3, SOCKET[column])),
        *((LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, AF_UNIX)),
        *((RETURN, 0, 0, ERROR | errno.EPERM), (RETURN, 0, 0, ALLOW)),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in out)


def apply() -> None:
    """Puts this process, and whatever it becomes or starts, behind the filter for good; no privileges are gained later.

    Raises OSError where the kernel has no seccomp or the machine is none of `MACHINES`.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}; there is one for {', '.join(MACHINES)}")
    instructions = program(machine)
    control(PR_SET_NO_NEW_PRIVS, 1)
    control(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(Filter(len(instructions) // 8, instructions)))


def control(option: int, *arguments: object) -> None:
    """prctl(2). Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    given += [ctypes.c_ulong(0)] * (4 - len(given))
    if library.prctl(option, *given) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {errno.errorcode.get(ctypes.get_errno(), 'error')}")
