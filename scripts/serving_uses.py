"""What the clients of a soak do: everything that clients do, well or badly."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from scripts.findings import Findings
from scripts.serving_client import Connection, Reply, ask, request_bytes
from scripts.serving_leavers import POINTS, Leaver
from scripts.serving_process import Server
from scripts.serving_requests import Bodies, judge

PART = "soak"
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_NAMES = ("city", "colour", "count", "price", "day", "size", "kind", "place")
_PAGES = ("/health", "/ready", "/metrics", "/v1/models", "/version", "/", "/page/state")
KEPT_SCHEMAS = 128  # compiled ones, the latest
_LARGE = 50 * 2**20  # bytes that are announced and never sent


class Uses:
    """Clients of every kind.

    Args:
        server: that they ask, and whose key they know.
        max_len: tokens of its slots.
        seed: of what they do.
        findings: takes what is found.

    Attributes:
        statuses: of all answers.
        kinds: how often each thing was done.
    """

    def __init__(self, server: Server, max_len: int, seed: int, findings: Findings) -> None:
        self.statuses: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self._num_mistakes = 0
        self._server = server
        self._choose = random.Random(seed)
        self._bodies = Bodies(server.model, max_len, self._choose)
        self._leaver = Leaver(server, self._bodies, findings)
        self._findings = findings
        self._weights: dict[Callable[[], Awaitable[None]], int] = {
            self._complete: 4,
            self._talk: 4,
            self._fill_in: 3,
            self._keep_on: 2,
            self._read_slowly: 2,
            self._leave: 4,
            self._mistake: 3,
            self._use_wrong_key: 1,
            self._tokenize: 1,
            self._look: 1,
        }

    async def fill(self) -> None:
        """Have every page of the cache touched, and everything kept that is kept of requests."""
        for _ in range(3):
            longest = (self._post(_COMPLETION, self._bodies.longest()) for _ in range(8))
            await asyncio.gather(*longest)
        for _ in range(KEPT_SCHEMAS // 8):
            schemas = (self._post(_CHAT, self._schema() | {"max_tokens": 2}) for _ in range(8))
            await asyncio.gather(*schemas)

    async def go_on(self, over: asyncio.Event) -> None:
        """Do one thing after the other."""
        kinds, weights = list(self._weights), list(self._weights.values())
        while not over.is_set():
            (kind,) = self._choose.choices(kinds, weights)
            await kind()
            self.kinds[kind.__name__.strip("_")] += 1

    async def do_all(self, times: int) -> None:
        """Do everything so often, at once."""
        await asyncio.gather(*(kind() for kind in self._weights for _ in range(times)))

    async def _complete(self) -> None:
        await self._post(_COMPLETION, self._completion())

    def _completion(self) -> dict[str, Any]:
        choose, body = self._choose, self._bodies.mixed()
        more: list[dict[str, Any]] = [
            *({}, {"n": 3, "temperature": 1.0, "seed": choose.randrange(2**31)}),
            {"structured_outputs": {"json": True}, "ignore_eos": False},
            {"stop": [choose.choice("aeiou"), "\n"]},
            {"logprobs": 5, "temperature": 0.8, "top_p": 0.9},
            {"prompt": [self._bodies.prompt(choose.randint(1, 9)) for _ in range(4)]},
            {"prompt": "The quick brown fox " * choose.randint(1, 5), "echo": True},
            {"logit_bias": {"65": 5}, "frequency_penalty": 0.5, "ignore_eos": False},
        ]
        return body | choose.choice(more)

    async def _talk(self) -> None:
        await self._post(_CHAT, self._chat())

    def _chat(self, **more: Any) -> dict[str, Any]:
        text = " ".join(self._choose.choices(_NAMES, k=self._choose.randint(1, 6)))
        turns = [{"role": "user", "content": text}] * self._choose.choice((1, 1, 1, 2))
        body: dict[str, Any] = {"model": self._server.model, "messages": turns}
        body["max_tokens"] = self._choose.randint(1, 24)
        body["stream"] = self._choose.random() < 0.5
        return body | self._choose.choice(({}, {"n": 2, "temperature": 1.0})) | more

    async def _fill_in(self) -> None:
        await self._post(_CHAT, self._schema())

    def _schema(self) -> dict[str, Any]:
        """A chat with a schema of its own each time, so that whatever keeps them stays full."""
        names = self._choose.sample(_NAMES, 2)
        kinds = [f"{name}-{self._choose.randrange(10**6)}" for name in names]
        schema = {
            "type": "object",
            "properties": {names[0]: {"enum": kinds}, names[1]: {"type": "boolean"}},
            "required": names,
            "additionalProperties": False,
        }
        form = {"name": "form", "schema": schema}
        return self._chat(response_format={"type": "json_schema", "json_schema": form})

    async def _keep_on(self) -> None:
        """Several requests on one connection."""
        with suppress(OSError):
            async with await Connection.to(self._server.port) as connection:
                for _ in range(4):
                    request = self._request(_COMPLETION, self._completion(), keep=True)
                    await self._take(await connection.ask(request))

    async def _read_slowly(self) -> None:
        body = self._bodies.completion(4, 48, True) | {"logprobs": 5}
        with suppress(OSError):
            async with await Connection.to(self._server.port, window=4096) as connection:
                await connection.send(self._request(_COMPLETION, body))
                await asyncio.sleep(self._choose.choice((0, 0.5, 1)))
                await self._take(await connection.answer(pause=0.01))

    async def _leave(self) -> None:
        await self._leaver.leave(self._choose.choice(POINTS))

    async def _mistake(self) -> None:
        """The next two of them."""
        requests = self._mistakes()
        for _ in range(2):
            status, request = requests[self._num_mistakes % len(requests)]
            self._num_mistakes += 1
            expected = (status, 429) if status in (400, 404) else (status,)
            self._judge(await ask(self._server.port, request), expected)

    def _mistakes(self) -> list[tuple[int, bytes]]:
        """Requests, and how they are to be answered where there is room for them."""
        server = self._server
        wrong: list[dict[str, object]] = [
            {"prompt": ""},
            {"logit_bias": {"99999999": 1}},
            {"prompt": [server.vocab_size]},
            {"prompt": [1] * 10**5},
            {"max_tokens": -1},
            {"n": "x"},
            {"no_such_field": 1},
            {"prompt": "\ud800"},
        ]
        return [
            (400, self._request(_COMPLETION, self._completion() | self._choose.choice(wrong))),
            (400, self._request(_COMPLETION, b'{"model": ')),
            (400, self._request(_CHAT, {"model": server.model, "messages": "x"})),
            (404, self._request(_CHAT, self._chat(model="another"))),
            (404, self._request("/v1/nothing", {})),
            (405, request_bytes("DELETE", _CHAT, key=server.key)),
            (431, request_bytes("GET", "/v1/models", headers={"X-Long": "x" * 20_000})),
            (400, b"nothing that can be read\r\n\r\n"),
            (413, self._announced(_LARGE)),
        ]

    def _announced(self, size: int) -> bytes:
        more = {"Content-Type": "application/json", "Content-Length": str(size)}
        return request_bytes("POST", _COMPLETION, key=self._server.key, headers=more)

    async def _use_wrong_key(self) -> None:
        request = request_bytes("POST", _COMPLETION, self._completion(), key="wrong")
        self._judge(await ask(self._server.port, request), (401,))

    async def _tokenize(self) -> None:
        await self._post("/tokenize", {"prompt": "a quick brown fox " * 20})

    async def _look(self) -> None:
        self._judge(await self._server.get(self._choose.choice(_PAGES)), (200,))

    async def _post(self, path: str, body: object) -> None:
        await self._take(await ask(self._server.port, self._request(path, body)))

    async def _take(self, reply: Reply) -> None:
        """Judge an answer; who is refused comes back when he was told to."""
        self._judge(reply, (200, 429))
        if reply.status == 429:
            await asyncio.sleep(int(reply.headers.get("retry-after", "1")))

    def _request(self, path: str, body: object, *, keep: bool = False) -> bytes:
        return request_bytes("POST", path, body, key=self._server.key, keep=keep)

    def _judge(self, reply: Reply, expected: tuple[int, ...]) -> None:
        self.statuses[reply.status] += 1
        judge(self._findings, PART, reply, expected)
        if reply.status == 200 and reply.is_stream and reply.error is not None:
            law = f"{PART}: a stream that begins well ends well"
            self._findings.wrong(law, json.dumps(reply.error))
