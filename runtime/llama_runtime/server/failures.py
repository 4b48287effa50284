"""What goes wrong with a request, as its answer says it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from llama_runtime.errors import BackendError, CaravanError, QueueFullError, RequestError
from llama_runtime.openai_api import error_body

logger = logging.getLogger(__name__)

RETRY_SECONDS = "1"  # after which a client that was refused may ask again
INVALID = "invalid_request_error"
UNAVAILABLE = 503
GONE = 499  # what a log says of a client that didn't wait for its answer, as nginx does


class StatusError(CaravanError):
    """A request that HTTP itself has a status for.

    Args:
        status: of HTTP.
        message: one sentence.
        kind: the type of OpenAI's errors.
        code: theirs too.
        param: the field or header that it is about.
        headers: that go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The body that says so."""
        error = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class ClientGoneError(CaravanError):
    """Nobody waits for the answer any more."""


def unavailable(message: str, code: str) -> StatusError:
    """A server that can't take requests now.

    Args:
        message: why, and what to do.
        code: the same in one word.
    """
    headers = {"Retry-After": RETRY_SECONDS}
    return StatusError(UNAVAILABLE, message, kind="server_error", code=code, headers=headers)


def crowded() -> StatusError:
    """A server that has as many connections as it takes, all of them with requests."""
    message = "the server has as many connections as it takes: try again later"
    return unavailable(message, "too_many_connections")


def failure(error: Exception, now: StatusError | None) -> StatusError:
    """An error as an answer; what the client isn't told of goes to the log.

    Args:
        error: what was raised.
        now: why the server takes no requests at this time, if that is so.
    """
    if isinstance(error, StatusError):
        return error
    if now is not None and _is_of_the_server(error):
        return now
    status, body = error_body(error)
    if status == 500:
        expected = isinstance(error, CaravanError)
        logger.error("a request failed: %s", error, exc_info=None if expected else error)
    said = body["error"]
    assert isinstance(said, dict)
    return StatusError(
        status,
        said["message"],
        kind=said["type"],
        code=said["code"],
        param=said["param"],
        headers={"Retry-After": RETRY_SECONDS} if status == 429 else None,
    )


def _is_of_the_server(error: Exception) -> bool:
    """Whether it says that nothing runs any more, and not what is wrong with a request."""
    if isinstance(error, (RequestError, QueueFullError, TimeoutError)):
        return False
    return isinstance(error, BackendError) or type(error) is CaravanError
