"""How many sequences should run at once, from how fast steps of each size move them.

More streams in a step share the reading of the weights, until there are so many that the step takes
longer by what each adds: beyond that knee a larger batch only answers later. Where it lies depends
on the machine, the model and the contexts, so it is looked for while requests run: sizes are powers
of two, and a neighbour of the present one is tried for a few steps and kept if it is worth it.
"""

from __future__ import annotations

from collections import deque

from llama_runtime.events import BatchDecision

START = 32  # a good guess anywhere; from there it is two trials to 128
WINDOW = 12  # steps that measure a size: few, because a burst of short requests is soon over
NEAR = 0.9  # of the limit: so many streams measure it; with fewer, prompts are still running
GAIN = 1.02  # a larger batch must give so much more: twice that, and the search would end too early
LOSS = 0.98  # a smaller one may give so much less: it answers sooner
TRIAL_STEPS = 512  # a trial that isn't over by then is given up: the sequences are long, or few
CHANGED = 1.6  # so many times as fast or as slow is another load, or another machine
LULL_STEPS = 256  # without anybody waiting: what was learnt before is out of date
UP, DOWN = 1, -1
# Steps between two trials of one direction. A smaller batch is tried seldom: streams that run on
# must end first, and meanwhile nobody new begins. A trial in vain makes the next pause longer.
PAUSES = {UP: 64, DOWN: 512}
LONGER, LONGEST_PAUSE = 4, 4096


class BatchSizer:
    """Finds the knee of throughput, and follows it when it moves.

    It knows nothing but what it is told: it has no clock, and the same steps give the same sizes.

    Args:
        most: how many may run at once, as memory allows.

    Attributes:
        limit: how many should run at once.
        decisions: the last changes of it.
    """

    def __init__(self, most: int) -> None:
        self.limit = self._start = min(START, most)
        self.decisions: deque[BatchDecision] = deque(maxlen=16)
        self._most = most
        self._step = -1
        self._rates: deque[float] = deque(maxlen=WINDOW)  # tokens a second, of steps near the limit
        self._trial: _Trial | None = None
        self._lull = self._peak = 0  # steps since anybody waited, and the most streams of one
        self._ceiling = 0  # a size that was too large, if there is one to try below it
        self._usual = 0.0  # tokens a second when the pauses began
        self._pauses = dict(PAUSES)
        self._not_before = {UP: 0, DOWN: PAUSES[DOWN]}

    def observe(self, num_streams: int, num_tokens: int, seconds: float, *, waits: bool) -> None:
        """Learn what a step took.

        Args:
            num_streams: sequences that it moved.
            num_tokens: tokens that they got.
            seconds: how long it took.
            waits: whether anybody waits for a slot.
        """
        self._step += 1
        if num_tokens and NEAR * self.limit <= num_streams <= self.limit:
            self._rates.append(num_tokens / max(seconds, 1e-9))
        if self._trial is not None:
            self._judge(self._trial)
        elif not waits:
            self._rates.clear()  # the limit holds nobody back
        elif len(self._rates) == WINDOW:
            self._try()
        self._lull, self._peak = (0, 0) if waits else (self._lull + 1, max(self._peak, num_streams))
        if self._lull == LULL_STEPS:
            self._rest()

    @property
    def _rate(self) -> float:
        """Tokens a second at this size.

        The upper quartile: others on the machine, a page fault or the first step of a shape make
        steps slower, and nothing makes them faster.
        """
        return sorted(self._rates)[-1 - WINDOW // 4]

    def _try(self) -> None:
        """Begin a trial of a neighbour, if it is time for one: rather of a larger one."""
        rate, self._usual = self._rate, self._usual or self._rate
        if not 1 / CHANGED < rate / self._usual < CHANGED:  # contexts have grown, for instance
            self._usual, self._ceiling = rate, 0
            self._pauses = dict(PAUSES)
            self._not_before = {UP: self._step, DOWN: self._step}
        for direction in (UP, DOWN):
            size = self._neighbour(direction)
            if size != self.limit and self._step >= self._not_before[direction]:
                self._trial = _Trial(self.limit, rate, direction, self._step)
                self._set(size, f"requests wait; {rate:.0f} tokens/s at {self.limit}")
                return

    def _judge(self, trial: _Trial) -> None:
        """Keep what is tried, or go back, if there is enough to tell by."""
        direction, tried = trial.direction, self.limit
        if len(self._rates) == WINDOW:
            if self._rate >= trial.rate * (GAIN if direction == UP else LOSS):
                self._trial, self._usual = None, self._rate
                self._put_off(-direction)  # but another step in this one may follow at once
                if direction == UP and self._ceiling:  # a larger one failed, but maybe long ago
                    self._pauses[UP] = PAUSES[UP]
                    self._put_off(UP)
                self._ceiling = 0
                return
            found = f"{self._rate:.0f} tokens/s at {tried}, {trial.rate:.0f} at {trial.origin}"
        elif self._step - trial.step < TRIAL_STEPS:
            return
        elif direction == UP:  # so few wait that it holds nobody back, and costs nothing
            self._trial = None
            return
        else:
            found = f"sequences are too long to try {tried}"
        self._trial = None
        self._put_off(direction)
        self._set(trial.origin, found)
        if direction == UP:  # look below it next, until there is little between; then begin anew
            self._ceiling = tried if tried - self.limit > self.limit // 4 else 0

    def _put_off(self, direction: int) -> None:
        self._not_before[direction] = self._step + self._pauses[direction]
        self._pauses[direction] = min(LONGER * self._pauses[direction], LONGEST_PAUSE)

    def _rest(self) -> None:
        """After a lull begin nearer to where every search begins: other requests may come."""
        self._trial, peak, self._ceiling = None, self._peak, 0
        self._lull = self._peak = 0
        self._usual, self._pauses = 0.0, dict(PAUSES)
        self._not_before = {UP: self._step, DOWN: self._step + PAUSES[DOWN]}
        size = max(self._neighbour(DOWN), self._start)
        if peak <= size < self.limit:
            self._set(size, f"nobody waited for {LULL_STEPS} steps of at most {peak}")

    def _neighbour(self, direction: int) -> int:
        """The next power of two, up to which steps of some backends are padded; or the middle.

        The middle is between this size and one that was too large.
        """
        if direction == DOWN:
            return max(1, 1 << (self.limit - 1).bit_length() >> 1)
        if self._ceiling:
            return (self.limit + self._ceiling) // 2
        return min(1 << self.limit.bit_length(), self._most)

    def _set(self, size: int, reason: str) -> None:
        self.decisions.append(BatchDecision(size, self._step, f"{self.limit} -> {size}: {reason}"))
        self.limit = size
        self._rates.clear()


class _Trial:
    """A size that is being tried.

    Args:
        origin: the size before.
        rate: tokens a second there.
        direction: ``UP`` or ``DOWN``.
        step: when it began.
    """

    __slots__ = ("direction", "origin", "rate", "step")

    def __init__(self, origin: int, rate: float, direction: int, step: int) -> None:
        self.origin = origin
        self.rate = rate
        self.direction = direction
        self.step = step
