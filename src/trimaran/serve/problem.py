"""What went wrong, in the form that OpenAI's clients read."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from trimaran.errors import Refusal

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Problem(Exception):
    """An answer of status 4xx or 5xx. `param` names the field at fault, `code` says it to machines."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """OpenAI's error document."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": presentable(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.document(), self.status, self.headers)


def presentable(text: str) -> str:
    """`text` as JSON can carry it, and no longer than anyone reads: it may quote what was sent."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 1000 else text[:1000] + " …"


def refused(refusal: Refusal, param: str | None = None, code: str | None = None) -> Problem:
    """A `Refusal` of the rooms below as an answer to whoever asked."""
    said = f"{refusal.found}; allowed: {refusal.allowed}; next: {refusal.next_step}"
    return Problem(400, said, param=param, code=code)


def invalid(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Pydantic's report on a body as one line: the first fault, and where it is."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = str(first.get("ctx", {}).get("error") or first["msg"])
    where = ".".join(place)
    return Problem(400, f"{where}: {message}" if where else message, param=where or None)
