"""The prompts of one call while they run: events of all of them, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from llama_runtime.admission import Message
from llama_runtime.async_calls import RETRY_SECONDS
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.async_request import AsyncRequest, Deadline
from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError, QueueFullError
from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox
from llama_runtime.openai_api import Prepared
from llama_runtime.sequence import TokenLogprob
from llama_runtime.server.metrics import Course, Tally
from llama_runtime.server.page_activity import Call

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
        self._params = prepared.params
        if len(prepared.prompts) > 1:
            self._params = replace(prepared.params, caller=call.id)
        self._mailbox = Mailbox()
        self._running: dict[int, tuple[AsyncRequest, Course]] = {}
        self._window = asyncio.Semaphore(2 * llm.max_batch)
        self._others: asyncio.Task[None] | None = None  # which begins the prompts after the first
        self._error: Exception | None = None
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
        try:
            await self._begin_first(submitted)
        except BaseException:
            await self.close()
            raise
        if len(self._prepared.prompts) > 1:
            self._others = asyncio.create_task(self._begin_others())

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
        found: list[Progress] = []
        if timeout is not None:
            self._be_reminded(timeout)
        while not (found or self.done or self._error):
            await self._mailbox.wait()
            letter = self._mailbox.take()
            if letter is None:
                break  # the time is up, or a prompt couldn't begin
            while letter is not None and self._error is None:
                if (progress := self._take(*letter)) is not None:
                    found.append(progress)
                letter = self._mailbox.take()
        if self._error is not None and not found:  # what came before it is true
            raise self._error
        return found

    async def close(self) -> None:
        """Give back what still runs."""
        if self._reminder is not None:
            self._reminder.cancel()
        if self._others is not None:
            self._others.cancel()
            await asyncio.gather(self._others, return_exceptions=True)
        for request, course in self._running.values():
            request.end()
            course.end()
            self._call.requests.discard(request)
        self._running.clear()

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
        else:
            self._mailbox.stir()

    async def _begin_first(self, submitted: Callable[[], object]) -> None:
        await self._window.acquire()
        try:
            await self._begin(0)
        except CaravanError as error:
            self._fail(0, error)
        else:
            submitted()
            while (letter := self._mailbox.take()) is None:
                await self._mailbox.wait()
            self._take(*letter)
        if self._error is not None:
            raise self._error

    async def _begin_others(self) -> None:
        """The prompts after the first, each when there is room for it."""
        for number in range(1, len(self._prepared.prompts)):
            await self._window.acquire()
            try:
                await self._begin_patiently(number)
            except (CaravanError, TimeoutError) as error:
                self._fail(number, error)
                self._mailbox.stir()
                return

    async def _begin_patiently(self, number: int) -> None:
        while True:
            try:
                return await self._begin(number)
            except QueueFullError:
                if self._deadline.left == 0:
                    raise self._deadline.error() from None
                await asyncio.sleep(RETRY_SECONDS)

    async def _begin(self, number: int) -> None:
        left = self._deadline.left
        course = Course(self._tally, self._call.started, self._params)
        request = self._llm.request(
            self._prepared.prompts[number],
            self._params,
            timeout=None if left is None else max(left, _LEAST_TIMEOUT),
            max_wait=self._max_wait,
            streamed=self._prepared.request.stream,
        )
        await request.begin(self._mailbox, number)
        self._running[number] = request, course
        self._call.requests.add(request)

    def _take(self, number: int, message: Message | TimeoutError) -> Progress | None:
        """Take a message about a prompt; the event that it is, if it is one."""
        if number not in self._running:
            return None  # its time was up just as it ended
        request, course = self._running[number]
        try:
            event = request.take(message)
        except (CaravanError, TimeoutError) as error:
            course.end(error)
            self._fail(number, error)
            return None
        if event is None:
            course.accepted(request.sequences)
            return None
        course.take(event)
        if request.ended:
            del self._running[number]
            self._call.requests.discard(request)
            self._window.release()
            self._num_left -= 1
            self._num_reused += min(seq.num_reused for seq in request.sequences)
        return Progress(number, event, request.prompt_logprobs)

    def _fail(self, number: int, error: Exception) -> None:
        if isinstance(error, CaravanError):
            error = self._prepared.explained(error, number)
        self._error = error


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
