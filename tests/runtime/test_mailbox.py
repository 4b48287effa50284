"""What a thread tells a loop comes in order and wakes it once; a closed loop is told nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest import mock

from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox

EVENTS = [TokenEvent(1, token_id, "") for token_id in range(32)]


def post_all(boxes: list[Mailbox]) -> None:
    for event in EVENTS:
        for box in boxes:
            assert box.post(0, event)


def test_what_is_told_at_once_wakes_the_loop_once_and_keeps_its_order() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        boxes = [Mailbox(), Mailbox()]
        for _ in range(2):
            with mock.patch.object(
                loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe
            ) as woken:
                thread = threading.Thread(target=post_all, args=(boxes,))
                thread.start()
                thread.join()  # the loop waits, as for the interpreter
            assert woken.call_count == 1
            for box in boxes:
                await box.wait()
                assert [box.take() for _ in EVENTS] == [(0, event) for event in EVENTS]
                assert box.take() is None

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_closed_loop_is_told_nothing() -> None:
    async def main() -> Mailbox:
        return Mailbox()

    box: Any = asyncio.run(main())
    assert not box.post(0, EVENTS[0])


def test_who_waits_is_woken_by_a_letter_or_a_stir() -> None:
    async def main() -> None:
        box = Mailbox()
        for stir in (False, True):
            waiting = [asyncio.create_task(box.wait()) for _ in range(2)]
            await asyncio.sleep(0)
            box.stir() if stir else box.post(1, EVENTS[0])
            await asyncio.gather(*waiting)
            assert box.take() == (None if stir else (1, EVENTS[0]))

    asyncio.run(asyncio.wait_for(main(), 10))
