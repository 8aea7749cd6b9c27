"""How often a model knows the value that a text of key recall ends on: read at its end, without sampling."""

import torch

from trimaran.model.hybrid import HybridModel
from trimaran.tasks.recall import Recall
from trimaran.text.tokenizer import Tokenizer


@torch.no_grad()
def recalled(model: HybridModel, tokenizer: Tokenizer, task: Recall, problems: int, first: int = 0) -> float:
    """The share of held-out problems `first` … whose value the model finds most likely, every token of it.

    It is what greedy decoding would write, for a token is only asked about where all before it were right.
    """
    was_training = model.training
    model.eval()
    right = sum(knows(model, tokenizer, task, number) for number in range(first, first + problems))
    model.train(was_training)
    return right / problems


def knows(model: HybridModel, tokenizer: Tokenizer, task: Recall, number: int) -> bool:
    """Whether the model says the value of one held-out problem."""
    question = tokenizer.encode(str(task.prompt(number, "held_out").messages[0]["content"]))
    whole = tokenizer.encode(task.document(number, "held_out"))
    shared = next((n for n, (one, other) in enumerate(zip(question, whole)) if one != other), len(question))
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens_BT = torch.tensor([before + whole], device=model.device)
    asked = len(whole) - shared  # tokens of the answer
    hidden_BTD = model.hidden(tokens_BT[:, :-1])[:, -asked:]
    return bool((model.head(hidden_BTD).argmax(-1) == tokens_BT[:, -asked:]).all())
