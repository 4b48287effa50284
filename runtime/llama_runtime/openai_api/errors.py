"""Errors as OpenAI's API says them: one shape, and one table of statuses."""

from __future__ import annotations

from collections.abc import Iterable

from llama_runtime.errors import (
    CapacityError,
    CaravanError,
    DeadlineError,
    QueueFullError,
    RequestError,
    one_line,
)

_MESSAGE_CHARACTERS = 2000
_LENGTH_FIELDS = ("prompt", "messages", "max_tokens", "max_completion_tokens")


class ModelNotFoundError(RequestError):
    """A request names a model that isn't served here.

    Args:
        model: the name.
        served: the models there are.
    """

    def __init__(self, model: str, served: Iterable[str]) -> None:
        super().__init__(
            f"there is no model {one_line(repr(model), 80)} here: ask for "
            f"{' or '.join(map(repr, served))}",
            param="model",
        )


def error_body(error: Exception, *, public: bool = True) -> tuple[int, dict[str, object]]:
    """The status and body that tell of an error.

    | error | status | type | code |
    |---|---|---|---|
    | ``ModelNotFoundError`` | 404 | invalid_request_error | model_not_found |
    | ``CapacityError`` of a length | 400 | invalid_request_error | context_length_exceeded |
    | other ``RequestError`` | 400 | invalid_request_error | null |
    | ``QueueFullError`` | 429 | rate_limit_error | rate_limit_exceeded |
    | ``DeadlineError``, ``TimeoutError`` | 504 | timeout_error | deadline_exceeded |
    | anything else | 500 | server_error | null |

    Args:
        error: what was raised.
        public: whether its reader is somebody else than who runs this, and so isn't told what went
            wrong inside (status 500), which may name files.

    Returns:
        The status of HTTP, and ``{"error": {"message", "type", "param", "code"}}``.
    """
    status, kind, code = _classified(error)
    message = one_line(error, _MESSAGE_CHARACTERS) or type(error).__name__
    if status == 500 and public:
        message = "the server failed on this request, and its log says why: try again later"
    elif not isinstance(error, CaravanError) and status == 500:
        message = f"{type(error).__name__}: {message}"
    param = error.param if isinstance(error, RequestError) else None
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _classified(error: Exception) -> tuple[int, str, str | None]:
    """Status, type and code; the first kind that the error is of counts."""
    if isinstance(error, ModelNotFoundError):
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, RequestError):
        field = error.param.partition("[")[0]
        is_length = isinstance(error, CapacityError) and field in _LENGTH_FIELDS
        return 400, "invalid_request_error", "context_length_exceeded" if is_length else None
    if isinstance(error, QueueFullError):
        return 429, "rate_limit_error", "rate_limit_exceeded"
    if isinstance(error, (DeadlineError, TimeoutError)):
        return 504, "timeout_error", "deadline_exceeded"
    return 500, "server_error", None
