"""Where a number was measured: versions, machine, commit and date; time and memory used so far."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("trimaran", "torch", "numpy", "transformers")


def environment() -> dict[str, str | int | None]:
    """What a results file says about its origin. Imports nothing: a GPU is named once torch is in use."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_initialized() else None
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "gpu": gpu,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the source tree that runs, "+" behind it when tracked files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() and (parent / "src" / "trimaran").is_dir() for parent in here.parents):
        return None  # installed, perhaps inside somebody else's repository
    git = ["git", "-C", str(here)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if dirty else "")


def cpu_name() -> str:
    """The processor by name where the system tells it, else by architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its finished children, in seconds."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def memory_in_use() -> tuple[str, int]:
    """("gpu ", bytes reserved there) once a GPU is in use, else ("", resident bytes of this process)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "gpu ", torch.cuda.memory_reserved()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return "", int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return "", 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return "", peak if sys.platform == "darwin" else peak * 1024
