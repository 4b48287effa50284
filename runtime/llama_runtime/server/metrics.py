"""What a server counts and times: sums and histograms that are cheap enough for every token."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from llama_runtime.errors import CaravanError, DeadlineError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence

REASONS = ("stop", "length", "abort", "error", "late")
# Those that ended as they were asked to, which alone tell how long answers take.
_WHOLE = ("stop", "length")

# Bounds that boards for vLLM know, and below them some for models as small as a processor runs.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_SPAN = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(one * 10**power) for power in range(6) for one in (1, 2, 5))
# Where the page takes quantiles from: bounds so close that they are right to a tenth.
PER_DOUBLING = 4
SHORTEST = 2.0**-10  # seconds, about a millisecond
_FINE = tuple(SHORTEST * 2 ** (one / PER_DOUBLING) for one in range(1 + 17 * PER_DOUBLING))
NUM_FINE = len(_FINE) + 1
_SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Histogram:
    """How many values lie up to each bound, and their sum.

    It takes a fifth of the time of ``prometheus_client``'s own, which locks.

    Args:
        bounds: upper ones, ascending; what lies above the last has a place of its own.

    Attributes:
        counts: of the values between a bound and the one before it, [len(bounds) + 1].
        total: their sum.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Seq[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value; only the event loop's thread may."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Tally:
    """What one server has counted since its start. A sequence is one completion, a choice.

    Times are seconds of the monotonic clock; all but those of first tokens and gaps are taken of
    sequences that ended whole, by "stop" or "length".

    Attributes:
        finished: sequences, by how they ended.
        refused: requests, by the status of the answer, 400 and above.
        first_token: from the arrival of the request until a sequence's first token is there.
        gap: from a token of a sequence to its next; 0 between those of one step.
        fine_first_token: as ``first_token``, by narrow bounds.
        fine_gap: as ``gap``, by narrow bounds.
        request: from the arrival of the request until the end of a sequence.
        queue: from when the prompt of a sequence was made until it had its slot.
        prefill: from its slot to its first token.
        decode: from its first token to its last.
        inference: from its slot to its last token.
        prompt_tokens: of a sequence's prompt.
        generated_tokens: of its completion.
        max_tokens: that it might have had.
        samples: sequences that a prompt was asked for.
    """

    finished: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    refused: Counter[int] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    gap: Histogram = field(default_factory=lambda: Histogram(_GAP))
    fine_first_token: Histogram = field(default_factory=lambda: Histogram(_FINE))
    fine_gap: Histogram = field(default_factory=lambda: Histogram(_FINE))
    request: Histogram = field(default_factory=lambda: Histogram(_SPAN))
    queue: Histogram = field(default_factory=lambda: Histogram(_SPAN))
    prefill: Histogram = field(default_factory=lambda: Histogram(_SPAN))
    decode: Histogram = field(default_factory=lambda: Histogram(_SPAN))
    inference: Histogram = field(default_factory=lambda: Histogram(_SPAN))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    generated_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    max_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    samples: Histogram = field(default_factory=lambda: Histogram(_SAMPLES))


class Course:
    """Times the sequences of one prompt, from the events that pass.

    Args:
        tally: takes what is seen.
        arrived: when the request came. The prompt goes to the engine when this is made.
        params: of all of them.
    """

    __slots__ = (
        *("_arrived", "_first", "_last", "_open", "_params", "_queued", "_sequences", "_tally"),
    )

    def __init__(self, tally: Tally, arrived: float, params: SamplingParams) -> None:
        self._tally = tally
        self._arrived = arrived
        self._params = params
        self._queued = time.monotonic()
        self._sequences: Seq[Sequence] = ()
        self._open = 0
        self._first = [0.0] * params.n  # 0 while there was none
        self._last = [0.0] * params.n

    def accepted(self, sequences: Seq[Sequence]) -> None:
        """Take what the engine has accepted, in the order of the samples."""
        self._sequences = sequences
        self._open = len(sequences)
        self._tally.samples.observe(len(sequences))

    def take(self, event: TokenEvent) -> None:
        """Take the time of an event, without an error."""
        now, sample = time.monotonic(), event.sample
        if event.token_id is not None:
            last = self._last[sample]
            self._last[sample] = now
            if last:
                self._tally.gap.observe(now - last)
                self._tally.fine_gap.observe(now - last)
            else:
                self._first[sample] = now
                self._tally.first_token.observe(now - self._arrived)
                self._tally.fine_first_token.observe(now - self._arrived)
        if event.finish_reason is not None:
            self._open -= 1
            self._tally.finished[event.finish_reason] += 1
            if event.finish_reason in _WHOLE:
                self._finish(sample, now)

    def end(self, error: Exception | None = None) -> None:
        """Count the sequences that are open as ended; a second call counts none.

        Args:
            error: what they ended with; None if the client hung up, or another prompt's error
                took them along.
        """
        if isinstance(error, (TimeoutError, DeadlineError)):
            reason = "late"
        elif error is None or type(error) is CaravanError:  # closed under those that run
            reason = "abort"
        else:
            reason = "error"
        self._tally.finished[reason] += self._open
        self._open = 0

    def _finish(self, sample: int, now: float) -> None:
        tally, seq = self._tally, self._sequences[sample]
        tally.request.observe(now - self._arrived)
        tally.prompt_tokens.observe(seq.num_prompt_tokens)
        tally.generated_tokens.observe(seq.num_completion_tokens)
        tally.max_tokens.observe(self._params.max_tokens)
        started = self._queued if seq.started is None else seq.started
        tally.queue.observe(started - self._queued)
        first, last = self._first[sample] or now, self._last[sample] or now
        tally.prefill.observe(first - started)
        tally.decode.observe(last - first)
        tally.inference.observe(last - started)
