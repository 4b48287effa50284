"""One model behind HTTP: whether it takes requests, and what is being answered."""

from __future__ import annotations

import asyncio
import hashlib
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from llama_runtime import __version__
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.errors import CaravanError
from llama_runtime.openai_api import ModelNotFoundError
from llama_runtime.server.bodies import Bodies
from llama_runtime.server.failures import StatusError, unavailable
from llama_runtime.server.gate import Gate
from llama_runtime.server.metrics import Tally
from llama_runtime.server.page_activity import Activity
from llama_runtime.server.settings import ServerSettings

ServerState = Literal["loading", "ready", "draining", "stopped"]


class Service:
    """What the application's routes share.

    Args:
        settings: how to answer.
        llm: the model, which stays its owner's to close; None while it loads, until ``begin``.

    Attributes:
        settings: as given.
        state: how far its life is. That the engine works is asked of the engine.
        bodies: those that are being read.
        gate: what comes in.
        activity: what runs, for the page.
        tally: what is counted, for the metrics.
        num_active: requests that are being answered.
    """

    def __init__(self, settings: ServerSettings, llm: AsyncLLM | None = None) -> None:
        self.settings = settings
        self.state: ServerState = "loading"
        self.bodies = Bodies(settings.incoming_bytes)
        self.gate = Gate(settings.text_threads)
        self.activity = Activity()
        self.tally = Tally()
        self.num_active = 0
        self._idle: set[asyncio.Event] = set()
        self._llm: AsyncLLM | None = None
        weakref.finalize(self, self.gate.close)
        if llm is not None:
            self.begin(llm)

    def begin(self, llm: AsyncLLM) -> None:
        """Take requests from now on.

        Args:
            llm: the model, loaded.
        """
        self._llm = llm
        manifest = llm.bundle.manifest
        self.created = int(time.time())
        self.names = self.settings.model_names or (manifest.name,)
        identity = f"{__version__}\n{manifest.to_json()}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.max_prompt_bytes = self.settings.prompt_bytes(llm.max_len)
        self.state = "ready"

    def refuse(self) -> None:
        """Take no requests from now on; those that are being answered go on."""
        if self.state != "stopped":
            self.state = "draining"

    async def settled(self, timeout: float) -> bool:
        """Wait until nothing is being answered.

        Args:
            timeout: seconds.

        Returns:
            Whether that is so.
        """
        event = asyncio.Event()
        self._idle.add(event)
        try:
            async with asyncio.timeout(timeout):
                while self.num_active:
                    event.clear()
                    await event.wait()
        except TimeoutError:
            return self.num_active == 0
        finally:
            self._idle.discard(event)
        return True

    def stop(self) -> None:
        """Nothing is answered any more: what is left is ended by the owner of the model."""
        self.state = "stopped"

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request while it is being answered."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1
            if not self.num_active:
                for event in self._idle:
                    event.set()

    @property
    def refusal(self) -> StatusError | None:
        """Why no requests are taken now, or None; it waits for nothing."""
        if self._llm is None:
            return unavailable("the model is being loaded: try again later", "loading")
        if self.state != "ready":
            return unavailable("the server is shutting down: ask another one", self.state)
        return self.broken

    @property
    def broken(self) -> StatusError | None:
        """That the engine will never answer again, if so."""
        try:
            health = "ok" if self._llm is None else self._llm.health()
        except CaravanError:  # a fork of the process that loaded it
            health = "closed"
        if health == "failed":
            return unavailable("the engine has failed, and has to be started again", "engine_dead")
        if health == "closed" and self.state == "ready":
            return unavailable("the model has been closed", "stopped")
        if self.hangs:
            message = (
                f"a step of the engine has run for more than {self.settings.max_step_time:g} s: if "
                "it doesn't end, the server has to be started again"
            )
            return unavailable(message, "engine_hangs")
        if health == "draining" and self.state == "ready":
            return unavailable("the server is shutting down: ask another one", "draining")
        return None

    @property
    def hangs(self) -> bool:
        """Whether the step that runs has taken longer than any may; it may still end."""
        limit = self.settings.max_step_time
        return limit is not None and self._llm is not None and self._llm.step_seconds > limit

    @property
    def llm(self) -> AsyncLLM:
        """The model, for a request that may be answered.

        Raises:
            StatusError: none may.
        """
        refusal = self.refusal
        if refusal is not None:
            raise refusal
        assert self._llm is not None
        return self._llm

    @property
    def loaded(self) -> AsyncLLM | None:
        """The model, whether or not it takes requests; None while it loads."""
        return self._llm

    def check_model(self, name: str) -> None:
        """Refuse what is asked of another model.

        Raises:
            ModelNotFoundError: it is another one.
        """
        if name not in self.names:
            raise ModelNotFoundError(name, self.names)
