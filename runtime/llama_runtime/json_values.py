"""What callers give as JSON, looked at."""

from __future__ import annotations


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie inside each other on more than so many levels."""
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in items)
