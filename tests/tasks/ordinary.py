"""A process that began as root and is an ordinary user now; runs what it is told in the sandbox, a JSON line each.

`step_down` leaves everything where it is and makes readable what only root could reach: interpreter, packages, sources.
Used as a program: `python -m tests.tasks.ordinary`, jobs on stdin, results on stdout.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trimaran.tasks import cell
from trimaran.tasks.sandbox import Limits, Ran, run

ROOT = Path(__file__).resolve().parents[2]
LOCKED = ("root", "home")  # folders that others may be barred from


def step_down() -> None:
    """Bars of folders such as /root are hidden by new ones in a mount namespace of our own; then root is given up."""
    cell.leave(cell.NEWNS)
    cell.mount("none", "/", None, cell.RECURSIVE | cell.PRIVATE)
    places = [place for place in {sys.base_prefix, sys.prefix, str(ROOT)} if place.split("/")[1] in LOCKED]
    kept = {place: tempfile.mkdtemp() for place in sorted(places)}
    for place, stash in kept.items():
        cell.mount(place, stash, None, cell.BIND)
    for top in {place.split("/")[1] for place in places}:
        cell.mount("tmpfs", f"/{top}", "tmpfs", 0, "mode=755")
    for place, stash in kept.items():
        os.makedirs(place, exist_ok=True)
        cell.mount(stash, place, None, cell.BIND)
        cell.kernel("umount2", os.fsencode(stash), cell.DETACH)
        os.rmdir(stash)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(4321, 4321, 4321)
    os.setresuid(4321, 4321, 4321)


def serve() -> None:
    step_down()
    for line in sys.stdin:
        job = json.loads(line)
        ran = run(job["source"], job["stdin"], Limits(**job["limits"]), job["isolation"])
        print(json.dumps(dataclasses.asdict(ran)), flush=True)


class Ordinary:
    """`sandbox.run` of that process."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.tasks.ordinary"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __call__(self, source, stdin="", limits=None, isolation="namespaces") -> Ran:
        limits = (limits or Limits()).model_dump()
        job = {"source": source, "stdin": stdin, "limits": limits, "isolation": isolation}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Ran(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0


if __name__ == "__main__":
    serve()
