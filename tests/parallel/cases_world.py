"""Every process knows its place, and its groups hold whom they should."""

import itertools

import torch
import torch.distributed as dist

from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import join


def places(size: int) -> None:
    sizes = (1, 2, 4)
    for pp, replicate, fsdp, cp, tp in itertools.product(sizes, repeat=5):
        if pp * replicate * fsdp * cp * tp != size:
            continue
        shards = fsdp * cp * tp
        for ep in (ep for ep in sizes if shards % ep == 0):
            settings = ParallelSettings(pp=pp, replicate=replicate, fsdp=fsdp, cp=cp, tp=tp, ep=ep)
            world = join(settings, torch.device("cpu"))
            place = world.place
            rank = place["pp"]
            for axis in ("replicate", "fsdp", "cp", "tp"):
                rank = rank * getattr(settings, axis) + place[axis]
            assert rank == dist.get_rank() == world.rank
            wanted = {"cut": fsdp * cp, "whole": shards, "efsdp": shards // ep, "ep": ep, "row": cp * tp}
            wanted |= {"tp": tp, "cp": cp, "pp": pp, "data": replicate * shards}
            for axis, count in wanted.items():
                assert dist.get_world_size(world.group(axis)) == count, axis
            assert dist.get_process_group_ranks(world.group("ep"))[place["ep"]] == rank
            assert dist.get_process_group_ranks(world.group("tp"))[place["tp"]] == rank
            mesh = world.mesh("cut")
            assert mesh.shape == ((replicate, fsdp * cp) if replicate > 1 else (fsdp * cp,))
            assert mesh.mesh[tuple(mesh.get_coordinate() or ())] == rank


CASES = {"places of 2": (2, places), "places of 4": (4, places)}
