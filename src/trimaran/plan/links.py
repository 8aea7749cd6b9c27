"""How long messages take: latency and bandwidth by where the members of a group stand, or measured curves.

Members of a group are `stride` ranks apart. Those of one domain talk over its fast links. Beyond it a ring crosses the
network once per domain, over as many network ports as the domain has members in the group; an all-to-all sends what
leaves the domain through each device's own port. Bytes on the wire, per device: all-reduce 2 (g-1)/g B, gather and
scatter (g-1)/g B of the whole buffer B, all-to-all (g-1)/g B, send B.
"""

from itertools import pairwise
from math import ceil, log2

from trimaran.plan.hardware import Hardware


def seconds(hardware: Hardware, kind: str, size: float, members: int, stride: int = 1) -> float:
    """Time of one collective among `members` ranks, each `stride` ranks from the next.

    size: bytes of the whole buffer (all-gather: of what is gathered; all-to-all: of what a device holds).
    """
    if members == 1 or size <= 0:
        return 0.0
    share = {"all_reduce": 2 * (members - 1) / members, "send": 1.0}.get(kind, (members - 1) / members)
    if kind in hardware.curves:
        return hardware.reach.exchange * along(hardware.curves[kind], share * size)
    inside = max(1, min(members, hardware.domain // stride))
    reach = hardware.reach
    link, network = hardware.link * reach.link, hardware.network * reach.network
    hops = ceil(log2(members))
    if inside == members:
        return hops * hardware.latency[0] + share * size / link
    latency = hops * hardware.latency[1]
    if kind == "send":
        return latency + size / network
    if kind == "all_to_all":
        leaving = (members - inside) / members
        return latency + max(size * leaving / network, size * (inside - 1) / members / link)
    return latency + share * size / min(link, network * inside)


def along(curve: list[tuple[float, float]], size: float) -> float:
    """The piecewise line through measured points; constant before the first, the last slope after the last."""
    if size <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if size <= x1:
            return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
    (x0, y0), (x1, y1) = curve[-2:]
    return y1 + max(0.0, (y1 - y0) / (x1 - x0)) * (size - x1)


def together(computing: float, talking: float, slowed_compute: float, slowed_link: float) -> float:
    """Time of computing with messages beside it (the form of Galvatron's cost model).

    While both run, computing takes `slowed_compute` times as long and messages `slowed_link` times; the shorter one is
    hidden whole, and what is left of the other runs at its own speed.
    """
    if talking <= 0 or computing <= 0:
        return computing + talking
    if computing * slowed_compute >= talking * slowed_link:
        beside = talking * slowed_link
        return beside + computing - beside / slowed_compute
    beside = computing * slowed_compute
    return beside + talking - beside / slowed_link
