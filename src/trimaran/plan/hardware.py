"""The machines a plan is made for: what their makers state, and which share of it training reaches.

Two kinds of numbers, kept apart. *Stated* figures come from data sheets (dense, without sparsity; one direction of a
link): peak FLOP/s by number format, bytes and bandwidth of memory, bandwidth of the fast links and how many devices
they join (`domain`), bandwidth of the network per device. *Reached* shares (`Reach`) are one set for a machine, never
for a model; `benchmarks/planner.py` fits them to published runs on A100 and H100, `trimaran plan … --measure FILE` to
the machine at hand.

Sources: A100 80GB data sheet (2021) and the Selene cluster (8 x HDR 200 Gb/s a node, arXiv 2104.04473); H100 data sheet
and DGX H100 (8 x NDR 400 Gb/s); H200 data sheet (H100's chip, other memory); DGX B200 data sheet (figures of eight
devices divided by 8); GB200 NVL72 data sheet (figures of the rack divided by 72, sparse ones halved).
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal, nearest_first

Precision = Literal["fp32", "bf16", "fp8", "nvfp4"]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
GIB = 1 << 30


class Reach(Settings):
    """How much of the stated figures work reaches.

    matmul, attention, scan   share of peak FLOP/s: matrix products, fused attention, the Mamba-2 scan
    memory, optimizer         share of memory bandwidth, for all that is read and written; for the optimizer's pass
    link, network             share of the links' bandwidth
    launch                    seconds that one more operation costs, whatever its size
    step                      seconds of a step that no part explains: batches, logs, the slowest of many
    tile                      rows that a matrix product's rows are rounded up to, on average by half of it
    slowed_compute            how many times as long computing takes while a collective runs beside it
    slowed_link               how many times as long a collective takes while computing runs beside it
    exchange                  how many times as long a message takes within a step as alone, where its curve was
                              measured alone: it is packed and unpacked, and computing has filled the caches
    waits                     share of computing for which processes that exchange wait for the slowest of them
    """

    matmul: float = Field(0.75, gt=0)
    attention: float = Field(0.5, gt=0)
    scan: float = Field(0.12, gt=0)
    memory: float = Field(0.8, gt=0)
    optimizer: float = Field(0.8, gt=0)
    link: float = Field(0.75, gt=0, le=1)
    network: float = Field(0.75, gt=0, le=1)
    launch: float = Field(1.5e-6, ge=0)
    step: float = Field(0.02, ge=0)
    tile: int = Field(128, gt=0)
    slowed_compute: float = Field(1.15, ge=1)
    slowed_link: float = Field(1.2, ge=1)
    exchange: float = Field(1.0, ge=1)
    waits: float = Field(0.0, ge=0)


class Hardware(Settings):
    """One kind of device and how devices are joined. Bytes, bytes/s, FLOP/s, seconds.

    peak        FLOP/s by number format of matrix products; a format that is missing runs as the next wider one
    domain      devices joined by the fast links; beyond it the network
    hides       messages can run beside computing
    chunk_operations   operations that the scan starts per chunk; 0: it is one kernel
    reserved    bytes that driver, libraries and communication keep from the model
    latency     seconds of one hop: inside the domain, beyond it
    curves      measured times of collectives, (bytes on the wire, seconds) with rising bytes; they replace the links
    """

    name: str
    peak: dict[str, float]
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    link: float = Field(gt=0)
    domain: int = Field(gt=0)
    network: float = Field(gt=0)
    hides: bool = True
    chunk_operations: int = Field(0, ge=0)
    reserved: float = Field(0.0, ge=0)
    latency: tuple[float, float] = (6e-6, 12e-6)
    curves: dict[str, list[tuple[float, float]]] = Field(default_factory=dict)
    reach: Reach = Reach()
    source: str = ""

    def flops(self, precision: Precision) -> float:
        """Peak FLOP/s of matrix products in a number format, or in the next wider one that the device has."""
        order = ("nvfp4", "fp8", "bf16", "fp32")
        wider = [name for name in order[order.index(precision) :] if name in self.peak]
        return self.peak[wider[0]] if wider else max(self.peak.values())

    @property
    def usable(self) -> float:
        """Bytes left for the model. The allocator's fragments take one part in twenty."""
        return 0.95 * (self.memory - self.reserved)


def nvidia(name: str, peak: dict[str, float], gib: float, bandwidth: float, link: float, **more: object) -> Hardware:
    fields = {"domain": 8, "network": 50e9, "reserved": 3 * GIB, **more}
    return Hardware(name=name, peak=peak, memory=gib * GIB, bandwidth=bandwidth, link=link, **fields)


def table() -> dict[str, Hardware]:
    """Every machine that a plan can name. Reached shares: A100 and H100 fitted, the rest taken over from H100."""
    # benchmarks/results/planner.json: fitted to all rows of its two machines.
    a100 = Reach(matmul=0.77, memory=0.82, link=0.86, network=0.69, slowed_compute=1.19, slowed_link=1.19)
    h100 = Reach(matmul=0.75, attention=0.55, memory=0.55, link=1.0, network=0.6, slowed_compute=1.23, slowed_link=1.23)
    return {
        "a100": nvidia(
            "a100",
            {"fp32": 156e12, "bf16": 312e12},  # fp32: TF32
            80,
            2.039e12,
            300e9,
            network=25e9,
            reach=a100,
            source="A100 80GB SXM data sheet; Selene (arXiv 2104.04473)",
        ),
        "h100": nvidia(
            "h100",
            {"fp32": 494.7e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            80,
            3.35e12,
            450e9,
            reach=h100,
            source="H100 SXM data sheet; DGX H100",
        ),
        "h200": nvidia(
            "h200",
            {"fp32": 494.7e12, "bf16": 989.4e12, "fp8": 1978.9e12},
            141e9 / GIB,
            4.8e12,
            450e9,
            reach=h100,
            source="H200 SXM data sheet; reached shares of the H100",
        ),
        "b200": nvidia(
            "b200",
            {"fp32": 1.125e15, "bf16": 2.25e15, "fp8": 4.5e15, "nvfp4": 9e15},
            180e9 / GIB,
            8e12,
            900e9,
            reach=h100,
            source="DGX B200 data sheet / 8; reached shares of the H100, not fitted",
        ),
        "gb200": nvidia(
            "gb200",
            {"fp32": 1.25e15, "bf16": 2.5e15, "fp8": 5e15, "nvfp4": 1e16},
            186e9 / GIB,
            8e12,
            900e9,
            domain=72,
            reach=h100,
            source="GB200 NVL72 data sheet / 72; reached shares of the H100, not fitted",
        ),
        "cpu": read(Path(__file__).with_name("cpu.json")),
    }


ALIASES = {"a100-80gb": "a100", "h100-sxm": "h100", "gb200-nvl72": "gb200", "this-cpu": "cpu"}


def find(name: str) -> Hardware:
    """A machine by name, or measured figures from a JSON file that `--measure` wrote."""
    if name.endswith(".json"):
        return read(Path(name))
    known = table()
    wanted = ALIASES.get(name.lower(), name.lower())
    if wanted not in known:
        near = nearest_first(wanted, known)
        step = f"did you mean --hardware {near[0]}? Or measure a machine: --measure FILE.json"
        raise Refusal(f"unknown hardware {name!r}", f"{', '.join(near)}, or a JSON file of --measure", step)
    return known[wanted]


def read(path: Path) -> Hardware:
    """Measured figures from the file that `--measure` wrote."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"no file {str(path)!r}", "a JSON file of --measure", f"write it: --measure {path}") from None
    except (IsADirectoryError, PermissionError) as problem:
        found = f"{str(path)!r} cannot be read: {(problem.strerror or str(problem)).lower()}"
        raise Refusal(found, "a JSON file of --measure", "name another file") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise Refusal(f"{str(path)!r} is no JSON", "a file that --measure wrote", "measure again") from None
    if not isinstance(fields, dict):
        raise Refusal(f"{str(path)!r} holds no table", "a file that --measure wrote", "measure again")
    return Hardware(**fields)
