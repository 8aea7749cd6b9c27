"""The filter as the kernel reads it, for machines that these tests do not run on, too."""

import errno
import re
import struct
from pathlib import Path

import pytest

from trimaran.tasks import seccomp
from trimaran.tasks.seccomp import ALLOW, CALLS, CLONE, CLONE3, ERROR, KILL, MACHINES, SOCKET, SOCKETPAIR

HEADERS = {
    "x86_64": ("asm/unistd_64.h", "x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": ("asm-generic/unistd.h",),
}


def verdict(machine: str, number: int, first: int = 0, architecture: int | None = None) -> int:
    """What classic BPF makes of a call (Linux, Documentation/networking/filter.rst)."""
    data = struct.pack("iIQ6Q", number, architecture or MACHINES[machine][0], 0, first, *[0] * 5)
    text = seccomp.program(machine)
    steps = [struct.unpack_from("HBBI", text, place) for place in range(0, len(text), 8)]
    place = value = 0
    while True:
        code, yes, no, constant = steps[place]
        place += 1
        if code == 0x06:  # return
            return constant
        if code == 0x20:  # load a word
            value = struct.unpack_from("I", data, constant)[0]
            continue
        holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
        place += yes if holds else no


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_filter_says(machine):
    column = MACHINES[machine][1]
    denied = {numbers[column] for numbers in CALLS.values()}
    special = {CLONE3[column], SOCKET[column], SOCKETPAIR[column]}
    for number in range(500):
        expected = ERROR | errno.EPERM if number in denied else ALLOW
        assert number in special or verdict(machine, number) == expected
    assert verdict(machine, CLONE3[column]) == ERROR | errno.ENOSYS
    assert verdict(machine, 0, architecture=0x40000003) == KILL  # a 32-bit program's way in
    assert verdict(machine, seccomp.X32 | 39) == KILL
    clone = CLONE[column]
    assert verdict(machine, clone, 0x11) == verdict(machine, clone, 0x3D0F00) == ALLOW  # fork, a thread
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert verdict(machine, clone, 0x11 | 1 << bit) == ERROR | errno.EPERM
    for sock in (SOCKET[column], SOCKETPAIR[column]):
        assert verdict(machine, sock, 1) == ALLOW
        assert {verdict(machine, sock, family) for family in (0, *range(2, 50))} == {ERROR | errno.EPERM}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_headers(machine):
    found = [Path("/usr/include") / name for name in HEADERS[machine] if (Path("/usr/include") / name).exists()]
    if not found:
        pytest.skip("no kernel headers here")
    text = found[0].read_text()
    defined = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    column = MACHINES[machine][1]
    ours = {**CALLS, "clone": CLONE, "clone3": CLONE3, "socket": SOCKET, "socketpair": SOCKETPAIR}
    known = {name: numbers[column] for name, numbers in ours.items() if name in defined}
    assert len(known) > 30 and known == {name: defined[name] for name in known}
    assert set(ours) - set(known) <= {"memfd_secret", "mount_setattr"}  # younger than some headers
