import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_stays_when_asked():
    """In a process of its own: the setting lasts. A block that is freed and taken again causes no new page faults."""
    program = """
import resource, torch
from trimaran.ops.memory import keep_freed_memory
kept = keep_freed_memory()
for _ in range(10):  # the heap settles
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(1 << 24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, faults = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert kept == "False" or int(faults) < 16384  # the pages of one block; without the setting each comes fresh
