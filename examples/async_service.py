"""Completions over TCP, with nothing but the standard library: one line in, a text out.

    python examples/async_service.py bundle &
    echo 'What is the capital of Peru?' | nc 127.0.0.1 8765

Clients that overlap share the batch. One that hangs up frees its slot; one too many is told so at
once; SIGTERM lets those in flight finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from llama_runtime import AsyncLLM, CaravanError, SamplingParams

HOST = "127.0.0.1"
PARAMS = SamplingParams(max_tokens=128)
SECONDS = 60.0  # for a request, the time that it waits for a slot included


async def main(bundle: str = "bundle", port: str = "8765") -> None:
    """Serve until SIGTERM or Ctrl-C; port 0 takes one that is free."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with await AsyncLLM.load(bundle, max_batch=16) as llm:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await answer(llm, reader, writer)
            writer.close()

        async with await asyncio.start_server(serve, HOST, int(port)) as server:
            print(f"listening on {HOST}:{server.sockets[0].getsockname()[1]}", flush=True)
            await stopped.wait()
            await llm.drain(timeout=SECONDS)


async def answer(llm: AsyncLLM, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read a question and write the answer as it grows."""
    question = (await reader.readline()).decode(errors="replace").strip()
    messages = [{"role": "user", "content": question}]
    try:
        async with llm.stream_chat(messages, PARAMS, timeout=SECONDS) as stream:
            async for event in stream:
                writer.write(event.text.encode())
                await writer.drain()  # raises when the client has gone, and leaves the stream
        writer.write(b"\n")
    except (CaravanError, TimeoutError) as error:  # one sentence: a full queue, a wrong request
        writer.write(f"error: {error}\n".encode())
    await writer.drain()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:3]))
    except CaravanError as error:  # no bundle there, too little memory
        sys.exit(f"error: {error}")
