"""What a proof finds: laws that are broken, and figures."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(slots=True)
class Findings:
    """Collects them.

    Attributes:
        broken: how often each law was.
        examples: the first case of each.
        figures: what is worth knowing where none is.
    """

    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def wrong(self, law: str, case: object) -> None:
        """A law doesn't hold."""
        self.broken[law] += 1
        self.examples.setdefault(law, f"{case}"[:1000])

    def hold(self, law: str, holds: bool, case: object = "") -> None:
        """A law holds or doesn't."""
        if not holds:
            self.wrong(law, case)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Go on with the next part if this one raises: what others find isn't lost."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.wrong(f"{name}: it comes to its end", repr(error))

    def end(self, **more: object) -> NoReturn:
        """Print what is wrong and a last line of JSON; the program's status is 1 if anything is.

        Args:
            more: what the last line is to say beside ``passed`` and the figures.
        """
        for line in self.bad:
            print(line)
        print(json.dumps({"passed": not self.bad, **more, **self.figures}), flush=True)
        sys.exit(bool(self.bad))

    @property
    def bad(self) -> list[str]:
        """A sentence a law that was broken."""
        return [f"{law}: {count} times: {self.examples[law]}" for law, count in self.broken.items()]
