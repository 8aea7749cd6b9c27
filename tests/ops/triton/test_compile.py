"""Every kernel compiles for an H200, and asks for no more shared memory than that has. No GPU is needed for it."""

import os
import subprocess
import sys

import pytest

SHARED = 227 * 1024  # bytes of one program on compute capability 9.0

# In a process of its own: here the kernels are the interpreter's.
COMPILE = """
import sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trimaran.ops import triton_conv, triton_experts, triton_norm, triton_paged, triton_router, triton_ssd
from trimaran.ops import triton_ssd_backward, triton_step

def compiled(name, kernel, types, constants, absent="", **options):
    types = {argument: kind for kind, arguments in types for argument in arguments.split()}
    signature, fixed = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in absent.split():
            signature[argument], fixed[place,] = "constexpr", constants.get(argument)
        else:
            signature[argument] = types.get(argument, "i32")
    made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32), options=options)
    print(name, made.metadata.shared, flush=True)

dtype = sys.argv[1]
T, kind, Q = "*" + dtype, {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype], {"bf16": 64, "fp32": 32}[dtype]
conv = [(T, "x tail weight bias grad out dx dtail"), ("*i32", "seg"), ("*fp32", "sums")]
tiles = dict(W=4, TIME=triton_conv.TIME, CHANNELS=triton_conv.CHANNELS)
compiled("conv", triton_conv.forward_kernel, conv, tiles)
compiled("conv bare", triton_conv.forward_kernel, conv, tiles, "tail bias seg")
compiled("conv backward", triton_conv.backward_kernel, conv, tiles)
norm = [(T, "x gate weight out grad dx dgate"), ("*fp32", "scale dweight"), ("fp32", "eps")]
compiled("norm", triton_norm.forward_kernel, norm, dict(BLOCK=4096), "gate")
compiled("norm backward", triton_norm.backward_kernel, norm, dict(BLOCK=4096), "gate dgate")
compiled("gated norm", triton_norm.forward_kernel, norm, dict(BLOCK=512))
compiled("gated norm backward", triton_norm.backward_kernel, norm, dict(BLOCK=512))
scan = [(T, "x B C scores before after dx dB dC"), ("*i32", "seg")]
scan += [("*fp32", "dt A state y last dy dlast ends dstate ddt dA")]
for size, q in ((128, Q), (256, Q // 2)):
    chunk = dict(Q=q, SIZE=size, KIND=kind)
    part, whole = chunk | dict(WIDTH=triton_ssd.SLICE), chunk | dict(WIDTH=64, R=8)
    compiled(f"scores {size}", triton_ssd.scores_kernel, scan, chunk)
    compiled(f"scan {size}", triton_ssd.scan_kernel, scan, part, num_warps=8, num_stages=2)
    compiled(f"scan bare {size}", triton_ssd.scan_kernel, scan, part, "state seg before", num_warps=8, num_stages=2)
    compiled(f"states {size}", triton_ssd_backward.states_kernel, scan, part, num_warps=8, num_stages=2)
    compiled(f"chunks {size}", triton_ssd_backward.chunks_kernel, scan, whole, num_warps=8, num_stages=1)
step = [(T, "x dt B C"), ("*fp32", "A D dt_bias y after"), ("*i64", "slots counts")]
for state, absent in ((torch.float32, "counts"), (torch.float16, "after"), (torch.bfloat16, "after")):
    info, words = torch.finfo(state), {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    numbers = dict(WIDTH=triton_step.SLICE, SIZE=128, TINY=info.smallest_normal, EPS=info.eps, TOP=info.max)
    kinds = [*step, (words[state], "state")]
    compiled(f"step {state}", triton_step.state_kernel, kinds, numbers | dict(FRACTION=13), absent)
conv = [(T, "inputs weight bias tail out"), ("*i64", "slots")]
compiled("conv step", triton_step.conv_kernel, conv, dict(W=4, CHANNELS=triton_step.CHANNELS))
rows = [(T, "x grad out rows hidden weight drows"), ("*i64", "slots ids"), ("*fp32", "weights dweights")]
few = dict(OUTPUTS=triton_experts.OUTPUTS, INPUTS=triton_experts.INPUTS)
compiled("relu2", triton_experts.relu2_kernel, rows, dict(ELEMENTS=1024), "grad")
compiled("relu2 backward", triton_experts.relu2_kernel, rows, dict(ELEMENTS=1024))
compiled("gather", triton_experts.gather_kernel, rows, dict(BLOCK=1024))
compiled("spread", triton_experts.spread_kernel, rows, dict(BLOCK=1024))
compiled("up", triton_experts.up_kernel, rows, few)
compiled("down", triton_experts.down_kernel, rows, few)
paged = [(T, "q k v"), ("*i64", "table length"), ("*fp32", "out lse"), ("fp32", "scale")]
blocks = dict(KEYS=triton_paged.KEYS, SPLITS=triton_paged.SPLITS, HEADS=16, WIDTH=128, KIND=kind)
compiled("paged", triton_paged.stretch_kernel, paged, blocks)
route = [("*fp32", "logits bias scores weights"), ("*i64", "ids"), ("fp32", "factor tiny")]
limits = dict(K=6, GROUPS=8, KEPT=4, NORMALISED=True, BLOCK=128, K_BLOCK=8, GROUP_BLOCK=8)
compiled("route", triton_router.route_kernel, route, limits)
compiled("route in one group", triton_router.route_kernel, route, limits | dict(GROUPS=1, KEPT=1, GROUP_BLOCK=1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_kernel_compiles_for_an_h200(dtype, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    shared = {name: int(size) for name, _, size in (line.rpartition(" ") for line in done.stdout.splitlines())}
    assert len(shared) == 30
    assert {name: size for name, size in shared.items() if size > SHARED} == {}
