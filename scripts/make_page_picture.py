"""See ``scripts/make_page_picture``."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from scripts.bench_batch_job import BUNDLE, build
from scripts.bench_machine import ROOT
from scripts.serving_client import ask, request_bytes
from scripts.serving_process import LLAMA_RUN, Server, running
from tests.browser import browser_tab, find_chromium

IMAGES = ROOT / "docs/images"
WIDTH, HEIGHT = 1120, 800
SLOTS, ASKING, SECONDS = 12, 18, 45.0  # the charts show the last minute
TOPICS = ("the sea", "a bridge", "bread", "old maps", "a comet", "winter", "a violin", "bees")
NAME = "smollm2"
PROMPT = "Write a short story about a caravan of llamas that crosses the Andes."


def main() -> None:
    """Have the model work, and look."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("there is no Chromium here: install it, or name one in CHROMIUM")
    build(options.bundle)
    size = ("--max-batch", str(SLOTS), "--max-len", "512", "--served-model-name", NAME)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(LLAMA_RUN, options.bundle, Path(folder), *size) as server,
        browser_tab(chromium, Path(folder)) as tab,
    ):
        threading.Thread(target=lambda: asyncio.run(_busy(server)), daemon=True).start()
        tab.resize(WIDTH, HEIGHT)
        tab.open(f"http://127.0.0.1:{server.port}/")
        time.sleep(SECONDS)
        tab.focus("#prompt")
        tab.type(PROMPT)
        tab.press("Enter", ctrl=True)
        time.sleep(6)
        IMAGES.mkdir(exist_ok=True)
        for scheme in ("light", "dark"):
            tab.prefer(prefers_color_scheme=scheme)
            time.sleep(1)
            tab.screenshot(IMAGES / f"page-{scheme}.png", whole=False)


async def _busy(server: Server) -> None:
    await asyncio.gather(*(_ask_on(server, random.Random(seed)) for seed in range(ASKING)))


async def _ask_on(server: Server, choose: random.Random) -> None:
    """A client that asks one thing after another, until the program ends."""
    while True:
        topic = choose.choice(TOPICS)
        words = " ".join(choose.choices(TOPICS, k=choose.randint(4, 60)))
        content = f"Tell me about {topic}. These are other things I like: {words}."
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": choose.randint(40, 220),
            "temperature": 1.0,
            "stream": True,
        }
        reply = await ask(server.port, request_bytes("POST", "/v1/chat/completions", body))
        if reply.status not in (0, 200):  # 0: the server has ended
            raise RuntimeError(f"{reply.status}: {reply.body[:500]!r}")
        await asyncio.sleep(choose.uniform(0.0, 3.0))


if __name__ == "__main__":
    main()
