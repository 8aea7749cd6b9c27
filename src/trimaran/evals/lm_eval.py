"""EleutherAI's lm-eval with a model of ours: the extra `trimaran[lm-eval]`.

    import lm_eval
    from trimaran.evals.lm_eval import Trimaran
    lm_eval.simple_evaluate(Trimaran("runs/demo"), tasks=["arc_easy"])

A task's words are read as text, in which control tokens mean nothing. Chat templates are therefore refused:
conversations are what `trimaran score` is for.
"""

from typing import Any, Literal

from trimaran.engine.folder import FolderSettings, open_folder
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.evals.likelihood import Found, Reader

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError:
    raise Refusal("lm-eval is not installed", "the extra", "pip install 'trimaran[lm-eval]'") from None


class Trimaran(LM):  # type: ignore[misc, unused-ignore]  # a class of no known type where lm-eval is absent
    """The model of a run folder or hub folder behind lm-eval's three questions. tokens: the most in one pass of
    likelihoods, padding included; engine: how it generates. Raises Refusal for a folder that cannot be opened."""

    def __init__(
        self,
        folder: str,
        tokens: int = 1024,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        engine: EngineSettings | None = None,
    ):
        super().__init__()
        opened = open_folder(folder, FolderSettings(device=device, dtype=dtype))
        self.reader = Reader(opened, engine or EngineSettings(), tokens)

    def loglikelihood(self, requests: list[Any]) -> list[Found]:
        return self.reader.continuations([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self.reader.texts([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self.reader.until([request.args for request in requests])

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise Refusal("apply_chat_template", "tasks without it", "leave it out, or use `trimaran score`")

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval files rendered chats under; there are none."""
        return ""
