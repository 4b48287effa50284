"""See ``scripts/bench_serving``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import selectors
import socket
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.params import SamplingParams
from scripts.bench_batch_job import BUNDLE, build
from scripts.bench_machine import machine
from scripts.serving_client import request_bytes
from scripts.serving_process import LLAMA_RUN, Server, running

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
    parser.add_argument("--requests", type=int, default=3, help="of each stream")
    parser.add_argument("--tokens", type=int, default=160, help="of each stream, in all requests")
    parser.add_argument("--threads", type=int, help="of the model; on a GPU it has none")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    build(options.bundle)
    with tempfile.TemporaryDirectory() as folder:
        size = ["--max-batch", str(options.streams)]
        size += ["--max-len", str(_max_len(options))]
        if options.threads is not None:
            size += ["--threads", str(options.threads)]
        with running(LLAMA_RUN, options.bundle, Path(folder), *size) as server:
            asyncio.run(_compared(server, options))


async def _compared(server: Server, options: argparse.Namespace) -> None:
    llm = await AsyncLLM.load(
        options.bundle,
        max_batch=options.streams,
        max_len=_max_len(options),
        threads=options.threads,
    )
    client = Client(server, options.streams)
    numbers = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(server.vocab_size) for _ in range(length)]

    rates: list[tuple[Rates, Rates]] = []  # of this process, and over HTTP
    later: list[float] = []
    async with llm:
        for number in range(options.rounds + 1):  # the first one warms up
            work = [
                [
                    (prompt(numbers.randint(*PROMPT_TOKENS)), tokens)
                    for tokens in _parts(options.tokens, options.requests, numbers)
                ]
                for _ in range(options.streams)
            ]
            found: dict[str, Rates] = {}
            for way in ("here", "there") if number % 2 else ("there", "here"):
                began = time.monotonic()
                if way == "here":
                    times = await asyncio.gather(*(_inside(llm, one) for one in work))
                else:
                    times = client.ask(work)
                found[way] = _rates(times, began)
            if not number:
                continue
            rates.append((found["here"], found["there"]))
            waits: list[float] = []
            for one in [(prompt(ALONE_TOKENS), 2) for _ in range(ALONE)]:
                began = time.monotonic()
                here = (await _inside(llm, [one]))[0] - began
                began = time.monotonic()
                waits.append(client.ask([[one]])[0][0] - began - here)
            later.append(1000 * median(waits))
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


def _max_len(options: argparse.Namespace) -> int:
    return PROMPT_TOKENS[1] + int(options.tokens)


def _parts(total: int, count: int, numbers: random.Random) -> list[int]:
    """A number in so many parts, each at least 1: all streams end at about the same time."""
    cuts = [0, *sorted(numbers.sample(range(1, total), count - 1)), total]
    return [end - start for start, end in pairwise(cuts)]


def _rates(found: list[Times], began: float) -> Rates:
    whole = sum(map(len, found)) / (time.monotonic() - began)
    start, end = max(times[0] for times in found), min(times[-1] for times in found)
    return Rates(sum(start < one <= end for times in found for one in times) / (end - start), whole)


async def _inside(llm: AsyncLLM, work: list[Work]) -> Times:
    times: Times = []
    for prompt, tokens in work:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for event in llm.stream(prompt, params):
            if event.text or event.finish_reason:  # which the server makes an event of
                times.append(time.monotonic())
    return times


class Client:
    """Connections that are kept between requests, as clients keep theirs.

    It notes when events come, and does as little else as it can, without an event loop of Python's:
    it shares the processor with the server.

    Args:
        server: that is asked.
        streams: connections to it.
    """

    def __init__(self, server: Server, streams: int) -> None:
        self._model = server.model
        self._selector = selectors.DefaultSelector()
        self._sockets = [
            socket.create_connection(("127.0.0.1", server.port)) for _ in range(streams)
        ]
        for number, one in enumerate(self._sockets):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(one, selectors.EVENT_READ, number)

    def ask(self, work: list[list[Work]]) -> list[Times]:
        """Have prompts continued, one after another on each connection; when each event came."""
        left = [[self._request(prompt, tokens) for prompt, tokens in reversed(one)] for one in work]
        times: list[Times] = [[] for _ in work]
        ends = [b""] * len(work)
        for one, requests in zip(self._sockets, left, strict=False):
            one.sendall(requests.pop())
        busy = len(work)
        while busy:
            for key, _ in self._selector.select():
                number = key.data
                data = self._sockets[number].recv(65536)
                if not data:
                    raise RuntimeError("the server hung up")
                times[number] += data.count(b"data: {") * [time.monotonic()]
                ends[number] = (ends[number] + data)[-len(_END) :]
                if ends[number] == _END:
                    ends[number] = b""
                    if left[number]:
                        self._sockets[number].sendall(left[number].pop())
                    else:
                        busy -= 1
        return times

    def _request(self, prompt: list[int], tokens: int) -> bytes:
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        return request_bytes("POST", "/v1/completions", body, keep=True)


if __name__ == "__main__":
    main()
