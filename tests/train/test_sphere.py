"""nGPT in training: after every update the weights are back on the sphere, and the loss falls."""

import torch

from tests.models import random_tokens, tiny
from trimaran.data.batch import Batch
from trimaran.model.linear import Embedding, Linear
from trimaran.model.sphere import COLUMNS
from trimaran.train.objective import Pretraining
from trimaran.train.optim import adamw


def test_weights_stay_on_the_sphere():
    model = tiny("ngpt", torch.float32).train()
    objective = Pretraining(model, mtp_scale=0.0, aux_loss=0.0, router_bias_rate=0.0)
    optimizer = adamw(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    tokens = random_tokens(2, 33)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 32, dtype=torch.int32), torch.ones(2, 32))
    losses = []
    for _ in range(20):
        loss, _ = objective.terms(objective.streams(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            lengths = module.weight.norm(dim=0 if name.rsplit(".", 1)[-1] in COLUMNS else 1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
