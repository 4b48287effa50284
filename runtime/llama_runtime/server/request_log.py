"""One line of JSON a request. What was asked and answered isn't in it."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from starlette.types import Scope

logger = logging.getLogger(__name__)

_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
_LONGEST_PATH = 200  # characters


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What is known of a request while it is answered.

    Attributes:
        id: what the client calls it, or a fresh one.
        method: of HTTP.
        path: without its query.
        status: of the answer; 0 if there was none, 499 if the client didn't wait for it.
        prompt_tokens: of its prompts.
        completion_tokens: that were generated for it.
        finish_reasons: of its choices that ended.
        error: the type of the error that it ended with, or None.
        first_token: seconds until it was there, or None.
        started: when it came, by the monotonic clock.
    """

    id: str
    method: str
    path: str
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    first_token: float | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """The record of a request that has just come."""
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        known = given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
        return cls(id=known, method=scope["method"], path=scope["path"][:_LONGEST_PATH])

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self.started

    def token_came(self) -> None:
        """Take the time of the first one."""
        if self.first_token is None:
            self.first_token = self.seconds

    def write(self) -> None:
        """Write the line."""
        fields: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.first_token is not None:
            fields["first_token_seconds"] = round(self.first_token, 4)
        if self.prompt_tokens:
            fields["prompt_tokens"] = self.prompt_tokens
            fields["completion_tokens"] = self.completion_tokens
            fields["finish_reasons"] = self.finish_reasons
        if self.error is not None:
            fields["error"] = self.error
        logger.info("%s", json.dumps(fields))


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request that the shell has let in."""
    record = scope["caravan.record"]
    assert isinstance(record, RequestRecord)
    return record
