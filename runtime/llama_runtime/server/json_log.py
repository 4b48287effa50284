"""A log of lines of JSON."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

from llama_runtime.errors import one_line
from llama_runtime.server import request_log


class JsonLines(logging.Formatter):
    """Each record as one line; those about requests are lines of JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging``."""
        message = record.getMessage()
        if record.name == request_log.logger.name:
            return message
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": one_line(message, 2000),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A log that nobody reads any more is no reason to stop answering."""


def log_to(stream: TextIO) -> None:
    """Have this process write its log there. For a program, not for a library.

    Args:
        stream: standard error.
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("llama_runtime").setLevel(logging.INFO)
