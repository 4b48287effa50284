"""The routes that run the model: completions and chats, whole and as streams."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from functools import partial

from starlette.types import Receive, Scope, Send

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.async_request import Deadline
from llama_runtime.openai_api import ApiRequest, Chunks, Head, Prepared, answer_body
from llama_runtime.openai_api.chunks import encode
from llama_runtime.params import SamplingParams
from llama_runtime.server.connection import parse_json, read_body, while_connected
from llama_runtime.server.failures import failure
from llama_runtime.server.gate import Place
from llama_runtime.server.generation import Collected, Generation, Progress
from llama_runtime.server.page_activity import Call
from llama_runtime.server.request_log import RequestRecord, record_of
from llama_runtime.server.service import Service
from llama_runtime.server.shell import JsonResponse
from llama_runtime.server.sizes import check_request

Parse = Callable[[object, SamplingParams], ApiRequest]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect it first
]
_QUICK_TOKENS = 500  # which are written in a few milliseconds, log-probabilities included
_PING = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


class Answers:
    """A route, as an ASGI application.

    Args:
        service: what all routes share.
        parse: reads its bodies.
        prefix: what its answers' ids begin with.
    """

    def __init__(self, service: Service, parse: Parse, prefix: str) -> None:
        self._service = service
        self._parse = parse
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. What the client doesn't wait for is given up, wherever it is."""
        settings, record = self._service.settings, record_of(scope)
        llm, deadline = self._service.llm, Deadline(settings.request_timeout)
        data = await read_body(scope, receive, settings, self._service.bodies)
        generation: Generation | None = None
        call = self._service.activity.enter(record)
        try:
            async with while_connected(receive):
                begun = self._begun(llm, data, deadline, record, call)
                del data  # which may be megabytes, and is needed until it is read
                prepared, generation = await begun
                head = self._head(prepared)
                if prepared.request.stream:
                    last = await self._stream(generation, Chunks(prepared, head), record, send)
                else:
                    answer = await self._whole(generation, prepared, head, record)
        finally:
            self._service.activity.leave(call)
            if generation is not None:
                await generation.close()
        if prepared.request.stream:
            await send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            await answer(scope, receive, send)

    async def _begun(
        self, llm: AsyncLLM, data: bytes, deadline: Deadline, record: RequestRecord, call: Call
    ) -> tuple[Prepared, Generation]:
        """The call that a body asks for, which the engine has taken."""
        with self._service.gate.enter(llm, len(data)) as place:
            async with deadline.kept():
                prepared = await place.run(partial(self._prepared, llm, data, place))
            record.prompt_tokens = sum(map(len, prepared.prompts))
            generation = Generation(llm, prepared, deadline, call, self._service.tally)
            await generation.start(self._service.settings.max_queue_time, place.leave)
        return prepared, generation

    def _prepared(self, llm: AsyncLLM, data: bytes, place: Place) -> Prepared:
        """What a body asks for, as token ids; runs in a thread."""
        request = self._parse(parse_json(data), llm.default_params)
        self._service.check_model(request.model)
        place.tokens = check_request(request, self._service.max_prompt_bytes)
        prepared = request.prepared(llm.encoder)
        place.tokens = sum(map(len, prepared.prompts)) * prepared.params.n
        return prepared

    def _head(self, prepared: Prepared) -> Head:
        name = f"{self._prefix}-{secrets.token_hex(12)}"
        service = self._service
        return Head(name, int(time.time()), prepared.request.model, service.fingerprint)

    async def _whole(
        self, generation: Generation, prepared: Prepared, head: Head, record: RequestRecord
    ) -> JsonResponse:
        collected = Collected(prepared)
        while not generation.done:
            for progress in await generation.some():
                _note(record, progress)
                collected.take(progress)

        def write() -> JsonResponse:
            return JsonResponse(
                answer_body(prepared, collected.completions, head, generation.num_reused)
            )

        scored = record.prompt_tokens if prepared.params.prompt_logprobs else 0
        if record.completion_tokens + scored <= _QUICK_TOKENS:
            return write()
        return await asyncio.get_running_loop().run_in_executor(self._service.gate.pool, write)

    async def _stream(
        self, generation: Generation, chunks: Chunks, record: RequestRecord, send: Send
    ) -> bytes:
        """Send the chunks of a call as they come.

        Nothing is sent before there is a token, or ``ping_seconds`` have passed: an error until
        then is an answer of its own.

        Returns:
            What is to be sent last.
        """
        patience = self._service.settings.ping_seconds
        happened = await generation.some(patience)
        await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS]})
        try:
            while True:
                events = [_event(chunk) for one in happened for chunk in chunks.take(*one)]
                for progress in happened:
                    _note(record, progress)
                if generation.done:
                    return b"".join(
                        [*events, *map(_event, chunks.end(generation.num_reused)), _DONE]
                    )
                if events or not happened:
                    data = b"".join(events) or _PING
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                happened = await generation.some(patience)
        except Exception as error:
            said = failure(error, self._service.refusal)
            record.error = said.code or said.kind
            return _event(encode(said.body))


def _note(record: RequestRecord, progress: Progress) -> None:
    event = progress.event
    record.token_came()
    record.completion_tokens += event.token_id is not None
    if event.finish_reason is not None:
        record.finish_reasons.append(event.finish_reason)


def _event(data: str) -> bytes:
    """An event of a stream, of one line of data."""
    return b"data: " + data.encode() + b"\n\n"
