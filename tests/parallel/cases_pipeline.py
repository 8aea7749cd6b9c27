"""Pipelines: every stage does its part of what one process does."""

from tests.parallel.compare import compare, equal_on

TIED = {"pattern": "M*ME-", "mtp_pattern": "*E", "mtp_depth": 2, "tie_embeddings": True}


def two_stages(size: int) -> None:
    """MTP; a tie without it; neither norms nor a final one."""
    equal_on(("everything", "llama", "ngpt"), pp=size)


def copies_of_the_embedding(size: int) -> None:
    """Read at the last stage by head, and by two depths of the draft block on every second step; clipped and not."""
    for clip in (0.1, None):
        compare({"pp": size}, "moe", changes=TIED, train={"mtp_every": 2, "clip": clip})
    compare({"pp": size}, "latent", train={"mtp_scale": 0.0})


def fewer_parts_than_stages(size: int) -> None:
    """GPipe; each of the parts with several rows, and more parts than 1F1B has under way."""
    compare({"pp": size, "micro_batches": size // 2}, "moe", rows=6, changes={"pattern": "EMEE*-E"})


def many_parts(size: int) -> None:
    compare({"pp": size, "micro_batches": 3 * size}, "qwen", rows=6 * size, train={"recompute": "RE"})


def four_stages(size: int) -> None:
    """Experts in every stage, uneven ones, and one with nothing but the end."""
    compare({"pp": size, "micro_batches": size}, "moe", rows=8, changes={"pattern": "EMEE*-ME", "mtp_pattern": "*E"})
    compare({"pp": size}, "dense", rows=8, changes={"pattern": "M-*R", "tie_embeddings": True})


def stages_shared_out(size: int) -> None:
    """Each stage's weights over two processes, by fsdp; as copies; both with the embedding read at both ends."""
    compare({"pp": 2, "fsdp": 2}, "everything", rows=8)
    compare({"pp": 2, "fsdp": 2}, "moe", rows=8, changes=TIED, train={"mtp_every": 2, "recompute": "M*"})
    compare({"pp": 2, "replicate": 2}, "moe", rows=8, changes=TIED)


CASES = {
    "two stages": (2, two_stages),
    "copies of the embedding": (2, copies_of_the_embedding),
    "many parts": (2, many_parts),
    "fewer parts than stages": (4, fewer_parts_than_stages),
    "four stages": (4, four_stages),
    "stages shared out": (4, stages_shared_out),
}
