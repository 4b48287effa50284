"""What whoever runs a server decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llama_runtime.errors import RequestError
from llama_runtime.settings import in_range

PROMPT_BYTES_PER_TOKEN = 8  # twice what text has; only white space has more
LEAST_PROMPT_BYTES = 65_536  # which take 30 ms, however short the context is
MAX_BODY_BYTES = 2**30
MAX_TEXT_THREADS = 256
LONGEST = 1e9  # seconds
MAX_INCOMING_BYTES = 2**40
INCOMING_BYTES = 64 * 2**20
LONGEST_NAME = 256  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server answers. How much may wait is said to ``AsyncLLM``.

    Attributes:
        model_names: what requests may call the model; none for the bundle's own name.
        api_keys: one of them has to come with every request but those for /health, /ping, /ready
            and the page's own files; none for a server that is open to all who can reach it.
        host_names: what a server without keys may be called in the Host header of requests, beside
            addresses of the loopback, so that no page in a browser reaches it by a name of its own;
            None for anything. ``llama-run serve`` sets it where it listens on the loopback.
        request_timeout: seconds that a request may take, from its first byte on; None for any.
        max_queue_time: seconds that it may wait for a slot; None for any.
        max_body_bytes: of one request.
        max_incoming_bytes: of all bodies that are being read at one time; a request whose body
            doesn't fit beside the others is refused. None takes 64 MiB, and at least as many as one
            body may have.
        max_header_bytes: of one request, its path included.
        max_prompt_bytes: of one prompt, or of the messages and tools of a chat, in UTF-8; more is
            refused before it becomes tokens. None takes eight times the context, which is twice as
            many as a text that fits has, and 64 KiB at least.
        body_timeout: seconds that a client may take to send its body.
        max_step_time: seconds after which a step is taken to hang: /health says so, and no requests
            are taken, until it ends; None for never.
        ping_seconds: after so many without a token a stream gets a comment, for whatever lies
            between and closes silent connections.
        metrics_compat: "vllm" has ``/metrics`` give vLLM's names too, for boards that know them.
        text_threads: threads that read bodies, render templates and make tokens of text.

    Raises:
        RequestError: one is out of range; ``param`` names it.
    """

    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    host_names: tuple[str, ...] | None = None
    request_timeout: float | None = 600.0
    max_queue_time: float | None = 60.0
    max_body_bytes: int = 4 * 2**20
    max_incoming_bytes: int | None = None
    max_header_bytes: int = 16 * 2**10
    max_prompt_bytes: int | None = None
    body_timeout: float = 30.0
    max_step_time: float | None = 120.0
    ping_seconds: float = 15.0
    metrics_compat: Literal["vllm"] | None = None
    text_threads: int = 4

    def __post_init__(self) -> None:
        for name in self.model_names:
            _check_name(name)
        for key in self.api_keys:
            _check_key(key)
        for name in ("request_timeout", "max_queue_time", "max_step_time"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))
        _check_seconds("body_timeout", self.body_timeout)
        _check_seconds("ping_seconds", self.ping_seconds)
        in_range("max_body_bytes", self.max_body_bytes, MAX_BODY_BYTES)
        if self.max_incoming_bytes is not None:
            in_range(
                "max_incoming_bytes",
                self.max_incoming_bytes,
                MAX_INCOMING_BYTES,
                low=self.max_body_bytes,
            )
        in_range("max_header_bytes", self.max_header_bytes, MAX_BODY_BYTES)
        in_range("text_threads", self.text_threads, MAX_TEXT_THREADS)
        if self.metrics_compat not in (None, "vllm"):
            raise RequestError(
                f"metrics_compat must be None or 'vllm', not {self.metrics_compat!r:.80}",
                param="metrics_compat",
            )
        if self.max_prompt_bytes is not None:
            in_range("max_prompt_bytes", self.max_prompt_bytes, MAX_BODY_BYTES)

    @property
    def incoming_bytes(self) -> int:
        """The most bytes of all bodies that are being read."""
        if self.max_incoming_bytes is not None:
            return self.max_incoming_bytes
        return max(INCOMING_BYTES, self.max_body_bytes)

    def prompt_bytes(self, max_len: int) -> int:
        """The most bytes of a prompt.

        Args:
            max_len: the most tokens of a prompt and its completion.
        """
        if self.max_prompt_bytes is not None:
            return self.max_prompt_bytes
        return max(LEAST_PROMPT_BYTES, PROMPT_BYTES_PER_TOKEN * max_len)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME:
        raise RequestError(
            f"model_names must be texts of 1 to {LONGEST_NAME} characters, not {name!r:.80}",
            param="model_names",
        )


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not key.isascii() or not key or " " in key:
        raise RequestError(
            "api_keys must be texts of ASCII characters without spaces", param="api_keys"
        )


def _check_seconds(param: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST:
        raise RequestError(
            f"{param} must be a number of seconds above 0, not {value!r:.80}", param=param
        )
