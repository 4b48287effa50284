"""What is being answered now, as the page shows it.

All of it is read and written on the event loop. The sequences are the engine's, whose thread goes
on while they are read: each number is true by itself, and nobody waits for a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from llama_runtime import sequence
from llama_runtime.async_request import AsyncRequest
from llama_runtime.server.request_log import RequestRecord


class Call:
    """One request while its prompts run.

    Args:
        record: of the request.
        activity: that it is part of.

    Attributes:
        id: of the request.
        requests: its prompts that wait or run.
    """

    def __init__(self, record: RequestRecord, activity: Activity) -> None:
        self.id = record.id
        self._record = record
        self._activity = activity
        self.requests: set[AsyncRequest] = set()

    @property
    def started(self) -> float:
        """When the request came, by the monotonic clock."""
        return self._record.started

    @property
    def age(self) -> float:
        """Seconds since the request came."""
        return self._record.seconds

    @property
    def sequences(self) -> Iterator[sequence.Sequence]:
        """Those that wait or run."""
        found = chain.from_iterable(request.sequences for request in self.requests)
        return (seq for seq in found if seq.finish_reason is None)


class Activity:
    """The requests whose prompts run now.

    Attributes:
        calls: these.
    """

    def __init__(self) -> None:
        self.calls: set[Call] = set()

    def enter(self, record: RequestRecord) -> Call:
        """Show a request, until it leaves."""
        call = Call(record, self)
        self.calls.add(call)
        return call

    def leave(self, call: Call) -> None:
        """Show it no more."""
        self.calls.discard(call)

    @property
    def sequences(self) -> Sequence[tuple[Call, sequence.Sequence]]:
        """All that wait or run, each with its request."""
        return [(call, seq) for call in self.calls for seq in call.sequences]
