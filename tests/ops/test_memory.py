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
torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 22)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, faults = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert kept == "False" or int(faults) < 5 * 4096  # a block is 4096 pages; without the setting all 20 come fresh
