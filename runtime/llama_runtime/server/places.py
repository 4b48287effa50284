"""How many connections there may be, and which of them goes when another one comes.

A connection that waits for its next request costs its client nothing, so a bound alone would let
anybody shut all others out. Here the one that has waited longest makes room. Where every connection
has a request, a few places are left beyond the bound: from there probes are answered, and others
are told to come again.
"""

from __future__ import annotations

from typing import Protocol

MAX_CONNECTIONS = 4096
SPARE = 64  # places beyond


class Waiter(Protocol):
    """A connection, as those see it that need its place."""

    def make_room(self) -> None:
        """Close it: it waits for a request."""


class Group:
    """Some connections, of which there may be so many.

    Args:
        limit: the most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._members: set[Waiter] = set()
        self._waiting: dict[Waiter, None] = {}  # for a request; those that wait longest come first

    def __len__(self) -> int:
        return len(self._members)

    def enter(self, one: Waiter) -> bool:
        """Take one in, which waits; False if there is no place and all others have requests."""
        if len(self._members) >= self._limit:
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            self.leave(longest)
            longest.make_room()
        self._members.add(one)
        self._waiting[one] = None
        return True

    def note(self, one: Waiter, *, waits: bool) -> None:
        """Take in whether one waits for a request; one that has left is ignored."""
        if not waits:
            self._waiting.pop(one, None)
        elif one in self._members:
            self._waiting.setdefault(one)

    def leave(self, one: Waiter) -> None:
        """One has gone; a second call does nothing."""
        self._members.discard(one)
        self._waiting.pop(one, None)


class Places:
    """Those of one server.

    Args:
        limit: connections that it takes.

    Attributes:
        within: these connections.
        beyond: those that came when all of them had requests.
    """

    def __init__(self, limit: int = MAX_CONNECTIONS) -> None:
        self.within = Group(limit)
        self.beyond = Group(SPARE)

    def enter(self, one: Waiter) -> Group | None:
        """Where a connection that has just come belongs; None if it must go."""
        for group in (self.within, self.beyond):
            if group.enter(one):
                return group
        return None
