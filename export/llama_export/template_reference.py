"""The program that renders chat templates as ``transformers`` does.

It is run in a process of its own, because templates are somebody else's programs and Jinja has no
limit for what they cost. A template that Caravan's renderer has finished could still loop here: the
two differ in small things, of which a template can tell where it is.

The settings, filters and names are those that ``transformers`` gives to Jinja; a test compares.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS = 2  # 18 conversations take 0.02 s, and the start of Python 0.1 s
MEMORY_BYTES = 2**30  # of addresses

Case = dict[str, Any]


def render_cases(
    source: str, special_tokens: dict[str, str], now: datetime, cases: list[Case]
) -> list[str | None]:
    """Render conversations.

    Args:
        source: the template.
        special_tokens: by the name the template has for them.
        now: the time it is told.
        cases: for each conversation ``messages``, ``tools`` and ``add_generation_prompt``.

    Returns:
        The prompts; None for a conversation that the template refuses or can't render.

    Raises:
        jinja2.TemplateSyntaxError: the template doesn't compile.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=now.strftime,
        dict=_Dict(),
        namespace=_PublicNamespace,
    )
    template = environment.from_string(source)
    prompts: list[str | None] = []
    for case in cases:
        try:
            prompts.append(template.render(special_tokens | {"documents": None} | case))
        except MemoryError:
            raise
        except Exception:  # whatever a template's expressions raise, the reference raises too
            prompts.append(None)
    return prompts


def main() -> None:
    """Render what standard input asks for, and write the prompts as a JSON list."""
    _set_limits()
    asked = json.load(sys.stdin)
    now = datetime.fromisoformat(asked["now"])
    prompts = render_cases(asked["source"], asked["special_tokens"], now, asked["cases"])
    if sum(len(prompt or "") for prompt in prompts) > asked["max_characters"]:
        raise ValueError(f"the prompts have more than {asked['max_characters']:,} characters")
    json.dump(prompts, sys.stdout)


class _Generation(Extension):
    """The tag around what the assistant wrote, which matters for training only."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> Node:
        """Write the block as if the tag weren't there."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """``dict`` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """``namespace`` whose attributes may not begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is among the arguments, so that a template may have an attribute of that name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _set_limits() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
