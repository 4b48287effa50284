"""See ``scripts/bench_serving``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.params import SamplingParams
from scripts.bench_batch_job import BUNDLE, build
from scripts.bench_machine import machine
from scripts.serving_client import request_bytes
from scripts.serving_process import LLAMA_RUN, Server, running

MAX_LEN = 512
PROMPT_TOKENS = (16, 128)  # the least and the most
ALONE_TOKENS = 64
ALONE = 15  # requests one by one, in a round
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
ASKED_RATIO, ASKED_MILLISECONDS = 0.97, 5.0

Times = list[float]  # when each event with text of a stream came, by the monotonic clock
Work = tuple[list[int], int]  # a prompt, and how many tokens are asked for


class Rates(NamedTuple):
    """Tokens a second of streams that begin together, each with one request after another.

    Attributes:
        busy: while all of them are at work, from the last one's first token to the first one's
            last.
        whole: from the start to the last end. Over HTTP requests come one after another, so that
            some decode while others' first prompts are read, in smaller pieces.
    """

    busy: float
    whole: float


def main() -> None:
    """Both in turns, and the medians of what they differ by."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each stream")
    parser.add_argument("--tokens", type=int, default=128, help="the most of a request")
    parser.add_argument("--threads", type=int, help="of the model; on a GPU it has none")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    build(options.bundle)
    with tempfile.TemporaryDirectory() as folder:
        size = ["--max-batch", str(options.streams), "--max-len", str(MAX_LEN)]
        if options.threads is not None:
            size += ["--threads", str(options.threads)]
        with running(LLAMA_RUN, options.bundle, Path(folder), *size) as server:
            asyncio.run(_compared(server, options))


async def _compared(server: Server, options: argparse.Namespace) -> None:
    llm = await AsyncLLM.load(
        options.bundle,
        max_batch=options.streams,
        max_len=MAX_LEN,
        threads=options.threads,
    )
    streams = [await Stream.to(server.port) for _ in range(options.streams)]
    numbers = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(server.vocab_size) for _ in range(length)]

    rates: list[tuple[Rates, Rates]] = []  # of this process, and over HTTP
    later: list[float] = []
    async with llm:
        for number in range(options.rounds + 1):  # the first one warms up
            work = [
                [
                    (prompt(numbers.randint(*PROMPT_TOKENS)), numbers.randint(1, options.tokens))
                    for _ in range(options.requests)
                ]
                for _ in streams
            ]
            found: dict[str, Rates] = {}
            for way in ("here", "there") if number % 2 else ("there", "here"):
                found[way] = await _all_at_once(
                    [
                        _inside(llm, one) if way == "here" else stream.ask(server.model, one)
                        for stream, one in zip(streams, work, strict=True)
                    ]
                )
            if not number:
                continue
            rates.append((found["here"], found["there"]))
            waits = [
                (await _wait(_inside(llm, [one])), await _wait(streams[0].ask(server.model, [one])))
                for one in ((prompt(ALONE_TOKENS), 2) for _ in range(ALONE))
            ]
            later.append(1000 * median(there - here for here, there in waits))
            inside, outside = rates[-1]
            print(
                f"{options.streams} streams: {inside.busy:6.0f} tokens/s inside, "
                f"{outside.busy:6.0f} over HTTP, {outside.busy / inside.busy:.3f} times, "
                f"{outside.whole / inside.whole:.3f} from start to end; alone, the first token "
                f"comes {later[-1]:+.2f} ms later",
                flush=True,
            )
    busy, whole = ([there[i] / here[i] for here, there in rates] for i in (0, 1))
    print(
        f"over HTTP: {median(busy):.3f} times the tokens/s (asked for: {ASKED_RATIO}), "
        f"{median(whole):.3f} from start to end"
    )
    print(f"first token {median(later):+.2f} ms (asked for: {ASKED_MILLISECONDS} at most)")
    figures = {
        **machine(),
        "streams": options.streams,
        "requests": options.requests,
        "tokens": options.tokens,
        "threads": options.threads,
        "tokens_per_second": rates,
        "ratio": median(busy),
        "ratio_low": min(busy),
        "ratio_high": max(busy),
        "whole_ratio": median(whole),
        "first_token_ms": median(later),
    }
    print(json.dumps(figures))


async def _all_at_once(streams: list[Coroutine[Any, Any, Times]]) -> Rates:
    began = time.monotonic()
    found = await asyncio.gather(*streams)
    whole = sum(map(len, found)) / (time.monotonic() - began)
    start, end = max(times[0] for times in found), min(times[-1] for times in found)
    return Rates(sum(start < one <= end for times in found for one in times) / (end - start), whole)


async def _wait(stream: Coroutine[Any, Any, Times]) -> float:
    began = time.monotonic()
    return (await stream)[0] - began


async def _inside(llm: AsyncLLM, work: list[Work]) -> Times:
    times: Times = []
    for prompt, tokens in work:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for event in llm.stream(prompt, params):
            if event.text or event.finish_reason:  # which the server makes an event of
                times.append(time.monotonic())
    return times


class Stream(asyncio.Protocol):
    """A connection that is kept between requests, as clients keep theirs.

    It notes when events come, and does as little else as it can: it shares the processor.
    """

    @classmethod
    async def to(cls, port: int) -> Stream:
        """One to a port of the loopback."""
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(cls, "127.0.0.1", port)
        return made

    async def ask(self, model: str, work: list[Work]) -> Times:
        """Have prompts continued, one after another; when each event came."""
        self._times: Times = []
        for prompt, tokens in work:
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
            body |= {"temperature": 0, "ignore_eos": True}
            self._end = b""
            self._done = asyncio.get_running_loop().create_future()
            self._transport.write(request_bytes("POST", "/v1/completions", body, keep=True))
            await self._done
        return self._times

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        self._times += data.count(b"data: {") * [time.monotonic()]
        self._end = (self._end + data)[-len(_END) :]
        if self._end == _END:
            self._done.set_result(None)


if __name__ == "__main__":
    main()
