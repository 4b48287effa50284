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
from statistics import mean, median
from typing import Any, NamedTuple

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.machine import default_threads
from llama_runtime.params import SamplingParams
from scripts.bench_batch_job import BUNDLE, build
from scripts.bench_machine import machine
from scripts.serving_client import request_bytes
from scripts.serving_process import LLAMA_RUN, Server, running

MAX_LEN = 512
PROMPT_TOKENS = 64
ALONE = 15  # requests one by one, in a round
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
ASKED_RATIO, ASKED_MILLISECONDS = 0.97, 5.0

Times = list[float]  # when each token of a stream came, by the monotonic clock


class Company(NamedTuple):
    """What streams that begin together gave.

    Attributes:
        whole: tokens a second, from the start to the last end. Over HTTP requests come one after
            another, so that some decode while others' prompts are read, in smaller pieces.
        steady: the same while all of them decode: by events, of which a token without text is none.
        first: mean seconds to the first token.
    """

    whole: float
    steady: float
    first: float


def main() -> None:
    """Both in turns, and the medians of what they differ by."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    build(options.bundle)
    with tempfile.TemporaryDirectory() as folder:
        size = ["--max-batch", str(options.streams), "--max-len", str(MAX_LEN)]
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
    ratios: list[float] = []
    steady: list[float] = []
    first: list[float] = []
    later: list[float] = []
    rates: list[tuple[float, ...]] = []
    numbers = random.Random(0)
    async with llm:
        for number in range(options.rounds + 1):  # the first one warms up
            prompts = [
                [numbers.randrange(server.vocab_size) for _ in range(PROMPT_TOKENS)]
                for _ in range(options.streams)
            ]
            alone = [
                [numbers.randrange(server.vocab_size) for _ in range(PROMPT_TOKENS)]
                for _ in range(ALONE)
            ]
            inside = await _all_at_once(
                [_inside(llm, one, options.tokens) for one in prompts], options.tokens
            )
            outside = await _all_at_once(
                [
                    stream.ask(server.model, one, options.tokens)
                    for stream, one in zip(streams, prompts, strict=True)
                ],
                options.tokens,
            )
            if not number:
                continue
            waits = [
                (
                    await _wait(_inside(llm, one, 2)),
                    await _wait(streams[0].ask(server.model, one, 2)),
                )
                for one in alone
            ]
            ratios.append(outside.whole / inside.whole)
            steady.append(outside.steady / inside.steady)
            rates.append((*inside, *outside))
            later.append(1000 * (outside.first - inside.first))
            first.append(1000 * median(there - here for here, there in waits))
            print(
                f"{options.streams} streams: {inside.whole:6.0f} tokens/s inside, "
                f"{outside.whole:6.0f} over HTTP, {ratios[-1]:.3f} times, {steady[-1]:.3f} while "
                f"all decode; first tokens {later[-1]:+6.1f} ms; alone, the first token comes "
                f"{first[-1]:+.2f} ms later"
            )
    print(
        f"over HTTP: {median(ratios):.3f} times the tokens/s, {median(steady):.3f} while all "
        f"decode (asked for: {ASKED_RATIO})"
    )
    print(f"first token {median(first):+.2f} ms (asked for: {ASKED_MILLISECONDS} at most)")
    figures = {
        **machine(),
        "streams": options.streams,
        "tokens": options.tokens,
        "threads": options.threads,
        "tokens_per_second": rates,
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "steady_ratio": median(steady),
        "first_token_ms": median(first),
        "first_token_ms_in_company": median(later),
    }
    print(json.dumps(figures))


async def _all_at_once(streams: list[Coroutine[Any, Any, Times]], tokens: int) -> Company:
    began = time.monotonic()
    found = await asyncio.gather(*streams)
    whole = tokens * len(found) / (time.monotonic() - began)
    start, end = max(times[0] for times in found), min(times[-1] for times in found)
    steady = sum(start < one <= end for times in found for one in times) / (end - start)
    return Company(whole, steady, mean(times[0] - began for times in found))


async def _wait(stream: Coroutine[Any, Any, Times]) -> float:
    began = time.monotonic()
    return (await stream)[0] - began


async def _inside(llm: AsyncLLM, prompt: list[int], tokens: int) -> Times:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [time.monotonic() async for _ in llm.stream(prompt, params)]


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

    async def ask(self, model: str, prompt: list[int], tokens: int) -> Times:
        """Have a prompt continued; when each event of it came."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        self._times: Times = []
        self._end = b""
        self._done: asyncio.Future[Times] = asyncio.get_running_loop().create_future()
        self._transport.write(request_bytes("POST", "/v1/completions", body, keep=True))
        return await self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        self._times += data.count(b"data: {") * [time.monotonic()]
        self._end = (self._end + data)[-len(_END) :]
        if self._end == _END:
            self._done.set_result(self._times)


if __name__ == "__main__":
    main()
