"""The prompts of one call while they run: events of all of them, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Union

from llama_runtime.async_calls import RETRY_SECONDS, Deadline
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.async_stream import AsyncStream
from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError, QueueFullError
from llama_runtime.events import TokenEvent
from llama_runtime.openai_api import Prepared
from llama_runtime.sequence import TokenLogprob
from llama_runtime.server.metrics import Course, Tally
from llama_runtime.server.page_activity import Call

# What the tasks of the prompts tell: that one has ended, too. "quiet" says that nothing happened.
_Event = Union["Progress", Exception, Literal["ended", "quiet"]]

_LEAST_TIMEOUT = 1e-6  # seconds: what has none left is told so by the engine


class Progress(NamedTuple):
    """An event of one prompt.

    Attributes:
        number: which prompt, from 0.
        event: what happened.
        prompt_logprobs: of its tokens, if they are asked for.
    """

    number: int
    event: TokenEvent
    prompt_logprobs: list[TokenLogprob | None]


class Generation:
    """Runs the prompts of a call, a window of them at a time.

    It is to be closed, which gives back what still runs.

    Args:
        llm: runs them.
        prepared: the call.
        deadline: when all has to be done.
        call: the same, as others see it; its prompts share the slots as one caller.
        tally: takes how its sequences went.
    """

    def __init__(
        self, llm: AsyncLLM, prepared: Prepared, deadline: Deadline, call: Call, tally: Tally
    ) -> None:
        self._llm = llm
        self._prepared = prepared
        self._deadline = deadline
        self._call = call
        self._tally = tally
        self._courses: list[Course] = []
        self._params = prepared.params
        if len(prepared.prompts) > 1:
            self._params = replace(prepared.params, caller=call.id)
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._error: Exception | None = None
        self._window = asyncio.Semaphore(2 * llm.max_batch)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_left = len(prepared.prompts)
        self._num_reused = 0
        self._reminder: asyncio.TimerHandle | None = None
        self._reminder_due = 0.0  # by the loop's clock

    @property
    def num_reused(self) -> int:
        """Prompt tokens that needn't be computed for any sample, of the prompts that have ended."""
        return self._num_reused

    @property
    def done(self) -> bool:
        """Whether every prompt has ended, and all of its events were taken."""
        return self._num_left == 0

    async def start(self, max_wait: float | None, submitted: Callable[[], object]) -> None:
        """Wait until the first prompt is accepted, so that a wrong call is told before any answer.

        The others are admitted as there is room for them.

        Args:
            max_wait: seconds that each may then wait for a slot.
            submitted: called when the engine counts the first prompt.

        Raises:
            QueueFullError: too much waits for a slot.
            TimeoutError: the deadline has passed.
            CaravanError: the prompt or a parameter is wrong, or the engine takes none.
        """
        self._max_wait = max_wait
        first, course = self._stream(0), self._course()
        try:
            await first.start(submitted)
        except CaravanError as error:
            explained = self._prepared.explained(error, 0)
            if explained is error:
                raise
            raise explained from error
        course.accepted(first.sequences)
        self._courses.append(course)
        self._tasks.append(asyncio.create_task(self._follow(0, first, course)))
        for number in range(1, len(self._prepared.prompts)):
            self._tasks.append(asyncio.create_task(self._run(number)))

    async def some(self, timeout: float | None = None) -> list[Progress]:
        """What has happened since; waits until something has.

        Args:
            timeout: seconds to wait; None for any.

        Returns:
            At least one event; none if the time is up, or all prompts have ended.

        Raises:
            CaravanError: a prompt ended with an error, said of the body.
            TimeoutError: the deadline has passed, or a prompt waited too long for a slot.
        """
        if self._error is not None:
            raise self._error
        found: list[Progress] = []
        if timeout is not None and self._events.empty():
            self._be_reminded(timeout)
        taken = await self._events.get()
        while True:
            if isinstance(taken, Exception):
                if not found:
                    raise taken
                self._error = taken  # what came before it is true
                return found
            if taken == "ended":
                self._num_left -= 1
            elif taken != "quiet":
                found.append(taken)
            if self._events.empty():
                return found
            taken = self._events.get_nowait()

    async def close(self) -> None:
        """Give back what still runs."""
        if self._reminder is not None:
            self._reminder.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for course in self._courses:
            course.end()

    def _be_reminded(self, seconds: float) -> None:
        """Hear of it when nothing has happened for so long; a timer for each event costs more."""
        loop = asyncio.get_running_loop()
        self._reminder_due = loop.time() + seconds
        if self._reminder is None:
            self._reminder = loop.call_at(self._reminder_due, self._remind, loop)

    def _remind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reminder = None
        if loop.time() < self._reminder_due:
            self._reminder = loop.call_at(self._reminder_due, self._remind, loop)
        elif self._events.empty():
            self._events.put_nowait("quiet")

    async def _run(self, number: int) -> None:
        """A prompt after the first, from when there is room for it."""
        try:
            async with self._window:
                await self._follow(number, *await self._started(number))
        except (CaravanError, TimeoutError) as error:
            self._fail(number, error)

    async def _started(self, number: int) -> tuple[AsyncStream, Course]:
        while True:
            stream, course = self._stream(number), self._course()
            try:
                await stream.start()
            except QueueFullError:
                if self._deadline.left == 0:
                    raise self._deadline.error() from None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            course.accepted(stream.sequences)
            self._courses.append(course)
            return stream, course

    def _course(self) -> Course:
        return Course(self._tally, self._call.started, self._params)

    async def _follow(self, number: int, stream: AsyncStream, course: Course) -> None:
        try:
            async with stream:
                with self._call.running(stream):
                    async for event in stream:
                        course.take(event)
                        self._events.put_nowait(Progress(number, event, stream.prompt_logprobs))
            self._num_reused += min(seq.num_reused for seq in stream.sequences)
            self._events.put_nowait("ended")
        except (CaravanError, TimeoutError) as error:
            course.end(error)
            self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        if isinstance(error, CaravanError):
            error = self._prepared.explained(error, number)
        self._events.put_nowait(error)

    def _stream(self, number: int) -> AsyncStream:
        left = self._deadline.left
        return self._llm.stream(
            self._prepared.prompts[number],
            self._params,
            timeout=None if left is None else max(left, _LEAST_TIMEOUT),
            max_wait=self._max_wait,
            streamed=self._prepared.request.stream,
        )


@dataclass(slots=True)
class _Growing:
    """One completion while it grows."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Collected:
    """The completions of a call, from the events of its sequences.

    Args:
        prepared: the call.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._growing: dict[tuple[int, int], _Growing] = {}
        self._done: list[list[Completion]] = [[] for _ in prepared.prompts]

    @property
    def completions(self) -> Seq[Seq[Completion]]:
        """Those that have ended, of each prompt."""
        return self._done

    def take(self, progress: Progress) -> None:
        """Take an event, without an error."""
        number, event, prompt_logprobs = progress
        growing = self._growing.setdefault((number, event.sample), _Growing())
        growing.texts.append(event.text)
        if event.token_id is not None:
            growing.token_ids.append(event.token_id)
        if event.logprob is not None:
            growing.logprobs.append(event.logprob)
        if event.finish_reason is None:
            return
        params = self._prepared.params
        self._done[number].append(
            Completion(
                text="".join(growing.texts),
                token_ids=growing.token_ids,
                finish_reason=event.finish_reason,
                num_prompt_tokens=len(self._prepared.prompts[number]),
                sample=event.sample,
                logprobs=growing.logprobs if params.logprobs else None,
                prompt_logprobs=prompt_logprobs if params.prompt_logprobs else None,
            )
        )
