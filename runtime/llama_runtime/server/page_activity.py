"""What is being answered now, and how long tokens took, as the page shows it.

All of it is read and written on the event loop. The sequences are the engine's, whose thread goes
on while they are read: each number is true by itself, and nobody waits for a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from llama_runtime import sequence
from llama_runtime.async_stream import AsyncStream
from llama_runtime.events import TokenEvent
from llama_runtime.server.request_log import RequestRecord

PER_DOUBLING = 4  # buckets: a quantile is right to a tenth
SHORTEST = 2.0**-10  # seconds, about a millisecond: the end of the first bucket
NUM_BUCKETS = 1 + 17 * PER_DOUBLING  # the last one but one ends at 128 s


class Durations:
    """Times, counted by their length since the start.

    Who reads the counts twice knows the quantiles of what came between, at any distance; so this
    keeps nothing for any reader.

    Attributes:
        counts: of each bucket. The first ends at ``SHORTEST``, the end of each other is
            ``2 ** (1 / PER_DOUBLING)`` times the one before, and the last one has none.
    """

    def __init__(self) -> None:
        self.counts = [0] * NUM_BUCKETS

    def add(self, seconds: float) -> None:
        """Count a time."""
        bucket = 0
        if seconds > SHORTEST:
            bucket = math.ceil(PER_DOUBLING * math.log2(seconds / SHORTEST))
        self.counts[min(bucket, NUM_BUCKETS - 1)] += 1


class Call:
    """One request while its prompts run.

    Args:
        record: of the request.
        activity: that it is part of.

    Attributes:
        id: of the request.
    """

    def __init__(self, record: RequestRecord, activity: Activity) -> None:
        self.id = record.id
        self._record = record
        self._activity = activity
        self._streams: set[AsyncStream] = set()
        self._has_token = False
        self._last: dict[int, float] = {}  # when each sequence that goes on had a token

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
        found = chain.from_iterable(stream.sequences for stream in self._streams)
        return (seq for seq in found if seq.finish_reason is None)

    @contextmanager
    def running(self, stream: AsyncStream) -> Iterator[None]:
        """Show the sequences of a prompt inside."""
        self._streams.add(stream)
        try:
            yield
        finally:
            self._streams.discard(stream)

    def took(self, event: TokenEvent) -> None:
        """Take the time of a token."""
        now = time.monotonic()
        before = self._last.pop(event.sequence_id, None)
        if event.token_id is None:
            return
        if before is not None:
            self._activity.between.add(now - before)
        elif not self._has_token:
            self._activity.first_token.add(self.age)
        self._has_token = True
        if event.finish_reason is None:
            self._last[event.sequence_id] = now


class Activity:
    """The requests whose prompts run now.

    Attributes:
        calls: these.
        first_token: from when a request came until it had a token.
        between: from one token of a completion to its next.
    """

    def __init__(self) -> None:
        self.calls: set[Call] = set()
        self.first_token = Durations()
        self.between = Durations()

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
