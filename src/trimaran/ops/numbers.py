"""The number contract: which quantities keep at least fp32 whatever the rest of the model runs in.

`promote_types` rather than a plain fp32, so that a fp64 test stays fp64 from end to end. Trainer and engine share the
model code, and the model code asks this table; nobody else decides.
"""

import torch
from torch import Tensor

AT_LEAST_FP32 = (
    "router",  # logits, scores, combine weights
    "dt",  # softplus(dt_raw + dt_bias), never clamped
    "A_log",
    "D",
    "dt_bias",
    "decay",  # exp(dt * A) and its running sums
    "ssm_state",
    "norm",  # the mean square and the weight multiply
    "logits",  # held in fp32; their GEMM takes operands of the model's dtype
    "loss",
    "head_gradient",  # several small terms are added into one large sum (Ultra's MTP failure)
)
WIDE = (torch.float32, torch.float64)
FP32_PARAMETERS = ("A_log", "D", "dt_bias", "e_score_correction_bias")


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in its own dtype where that is wider."""
    # Asked hundreds of times a pass, mostly of what is wide already: a look is cheaper than a call.
    return x if x.dtype in WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


def parameter_dtype(name: str, asked: torch.dtype) -> torch.dtype:
    """The dtype in which the parameter or buffer called `name` is stored when the model is asked for in `asked`."""
    if name.rsplit(".", 1)[-1] in FP32_PARAMETERS:
        return torch.promote_types(asked, torch.float32)
    return asked
