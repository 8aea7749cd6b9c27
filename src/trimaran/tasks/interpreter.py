"""What a Python interpreter needs of the file system to run: itself, its standard library, shared libraries.

The libraries are asked of the loader after every extension module of the standard library has been imported, so they
are exactly those that programs can come to need, under the very names that the loader looks for.
"""

import ctypes
import glob
import importlib
import json
import os
import sys
import sysconfig
from typing import Any

LEFT_OUT = ("_test", "xx", "_tkinter", "readline", "_curses", "nis")  # terminals, windows, and CPython's own tests
LATE = ("libgcc_s.so.1",)  # what the C library loads at need: a thread that ends unwinds its stack with it
LOADER_CACHE = "/etc/ld.so.cache"  # says where libraries outside of the loader's own folders are


class Loaded(ctypes.Structure):
    """The head of struct dl_phdr_info."""

    _fields_ = (("address", ctypes.c_size_t), ("name", ctypes.c_char_p))


def libraries() -> list[str]:
    """Paths of the shared libraries of this process, by dl_iterate_phdr(3)."""
    found: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Loaded), ctypes.c_size_t, ctypes.c_void_p)
    def note(entry: Any, size: int, data: object) -> int:
        found.append(os.fsdecode(entry.contents.name or b""))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(note, None)
    return [os.path.normpath(path) for path in found if path.startswith("/")]


def needs() -> dict[str, Any]:
    """`executable`; `paths`, itself and all else that it reads; `hidden`, folders of other people's packages in there.

    To be called in an interpreter that is to be given away afterwards: it imports whatever there is.
    """
    folders = sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
    for path in glob.glob(os.path.join(folders[-1], "lib-dynload", "*.so")):
        name = os.path.basename(path).split(".")[0]
        if not name.startswith(LEFT_OUT):
            try:
                importlib.import_module(name)
            except ImportError:  # built without its library: programs cannot import it either
                continue
    for name in LATE:
        try:
            ctypes.CDLL(name)
        except OSError:  # another C library, which does without
            continue
    outside = [path for path in libraries() if not path.startswith(tuple(folder + os.sep for folder in folders))]
    cache = [LOADER_CACHE] if os.path.exists(LOADER_CACHE) else []
    executable = os.path.realpath(sys.executable)
    packages = [os.path.join(folder, name) for folder in folders for name in ("site-packages", "dist-packages")]
    return {
        "executable": executable,
        "paths": [*dict.fromkeys([executable, *folders, *outside, *cache])],
        "hidden": [folder for folder in packages if os.path.isdir(folder)],
    }


def main() -> None:
    """Writes them as JSON."""
    json.dump(needs(), sys.stdout)
