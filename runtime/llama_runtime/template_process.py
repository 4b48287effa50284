"""Chat templates, rendered in a process of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime

from llama_runtime.limited_process import LimitedProcess, can_start
from llama_runtime.template_renderer import Answer, answer


def ask(
    source: str, variables: Mapping[str, object] | None, now: datetime | None = None
) -> Answer | None:
    """Compile a template, and render it if there are variables.

    In a program that embeds Python, no interpreter may be there to start. Then templates are
    rendered in this process, within the limits of fuel alone.

    Args:
        source: the Jinja source.
        variables: JSON values; None only compiles.
        now: the time to tell the template; None for that of the clock.

    Returns:
        See ``template_renderer.answer``; None if it went over a limit of time or memory, or
        crashed the renderer.

    Raises:
        CaravanError: the process can't be started.
    """
    time = None if now is None else now.isoformat()
    request = json.dumps({"source": source, "variables": variables, "now": time}).encode()
    if not can_start():
        return answer(request)
    reply = _renderer.ask(request)
    if reply is None:
        return None
    value: Answer = json.loads(reply)
    return value


_renderer = LimitedProcess("llama_runtime.template_renderer", "renders chat templates")
