"""How a training program works, as far as time and memory depend on it: what it shards, hides, keeps and repeats.

`TRIMARAN` is this library's own way (`parallel/`). The published runs that `benchmarks/planner.py` predicts were made
by other programs; their practices are facts of those programs, written down there, and never fitted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Practice:
    """Bytes are per parameter or per value.

    sequence_parallel   what tp does not cut is divided along the sequence over tp
    fused_attention     scores never reach memory, and only half of them are computed
    shards_weights      fsdp divides weights and gradients too; otherwise the optimizer's state alone
    regathers           weights are gathered again for the backward pass
    sums_last           gradients add up on each device and travel once a step, after the last micro-batch
    hides_data          gathers and sums of fsdp and replicate run beside computing
    hides_tensor        so do those of tp; hides_pipeline, hides_experts: and those of pp, ep
    balanced_context    cp deals out the causal triangle evenly; otherwise the last piece sees whole rows
    even_stages         a pipeline stage has as many layers as the next; otherwise as much work
    scan_by_state       cp passes the Mamba state on, and scans twice; otherwise heads are exchanged
    cuts_handed         a stage hands on one tp-th of its output over each network port
    dispatch_once       a token goes to each domain once, however many of its experts are there
    keeps_gathered      the gathered inputs of tp wait for the backward pass
    weight, gradient, optimizer   bytes of a parameter's stored weight, gradient and optimizer state
    message             bytes of a weight on its way to where it is used
    summed              bytes of a gradient on its way into the sum
    stream              bytes of a value of the residual stream
    loss_chunk          tokens whose logits exist at once; 0: all
    """

    sequence_parallel: bool = True
    fused_attention: bool = True
    shards_weights: bool = True
    regathers: bool = True
    sums_last: bool = True
    hides_data: bool = True
    hides_tensor: bool = False
    hides_pipeline: bool = False
    hides_experts: bool = False
    balanced_context: bool = False
    even_stages: bool = False
    scan_by_state: bool = True
    cuts_handed: bool = True
    dispatch_once: bool = False
    keeps_gathered: bool = True
    weight: int = 4
    gradient: int = 4
    optimizer: int = 8
    message: int = 4
    summed: int = 4
    stream: int = 2
    loss_chunk: int = 1024


TRIMARAN = Practice()
