"""The C++ kernels in each instruction set that this processor has, not in its best alone."""

import os
import subprocess
import sys

import pytest

from trimaran.errors import Refusal
from trimaran.ops import backend, native

AVX2 = """
import torch, pytest, sys
from trimaran.ops import native
assert native.instruction_set() == "avx2", native.instruction_set()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/ops/test_native.py"]))
"""


@pytest.mark.skipif(native.library() is None, reason=str(native.missing()))
def test_the_avx2_kernels_pass_the_same_tests():
    """In a process of its own, whose torch is limited by environment, as a lesser processor would limit it."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([sys.executable, "-c", AVX2], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.skipif("amx_bf16" not in native.instruction_sets(), reason="this processor has no matrix unit")
def test_the_matrix_unit_can_be_forbidden():
    assert native.instruction_set() == "amx_bf16"
    with backend.using("-native.amx"):
        assert native.instruction_set() == "avx512_bf16" and native.library() is not None
    assert native.instruction_set() == "amx_bf16"


@pytest.mark.skipif("amx_bf16" in native.instruction_sets(), reason="this processor has a matrix unit")
def test_a_matrix_unit_that_is_not_there_cannot_be_forced():
    with pytest.raises(Refusal, match="matrix unit" if native.library() is not None else "native kernels"):
        backend.choose("native.amx")
