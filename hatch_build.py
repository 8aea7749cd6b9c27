"""Builds the C++ kernels into the wheel, one library per instruction set; without a compiler the wheel goes without.

The sources need neither Python nor torch, so one wheel serves every Python; only the platform is in its tag. OpenMP is
left to the process: torch has it loaded, and sharing its threads is the point.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("src/trimaran/ops/kernels")
SETS = {
    "amx_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "avx2": ["-march=x86-64-v3"],
}
# Sums may be reordered, as vector lanes must; infinities and NaN keep their meaning.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-nodefaultlibs", "-fno-exceptions", "-fno-rtti"),
    *("-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
    *("-ffp-contract=fast", "-Wno-psabi"),
]


class KernelsHook(BuildHookInterface):
    """Compiles for Linux on x86-64; elsewhere torch's own forms run."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
            self.app.display_info("trimaran: no native kernels for this platform; the torch forms will run")
            return
        if compiler is None:
            self.app.display_warning("trimaran: no C++ compiler; the torch forms will run (slower decoding on a CPU)")
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = list(pool.map(lambda name: self.compile(compiler, name), SETS))
        for name, problem in zip(SETS, problems, strict=True):
            if problem:
                self.app.display_warning(f"trimaran: {compiler} cannot build kernels for {name}:\n{problem}")
            else:
                build_data["artifacts"].append(str(KERNELS / f"{name}.so"))
        if build_data["artifacts"]:
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"

    def compile(self, compiler: str, name: str) -> str:
        """One library, and what went wrong; a compiler that cannot make it leaves none."""
        folder = Path(self.root) / KERNELS
        made, whole = folder / f"{name}.so.part", folder / f"{name}.so"
        command = [compiler, *FLAGS, *SETS[name], str(folder / "kernels.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            made.unlink(missing_ok=True)
            whole.unlink(missing_ok=True)
            return done.stderr[-2000:] or f"exit code {done.returncode}"
        made.replace(whole)
        return ""
