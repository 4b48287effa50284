"""The licence of a model, as its publisher states it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

LICENCE_FILES = ("license", "licence", "notice", "use_policy")
README_BYTES = 64 * 1024
_FIELD = re.compile(r"^(license|license_name):[ \t]*[\"']?([^\"'\s#\[{|>][^\"'\n#]*)", re.MULTILINE)


def licence_files(directory: Path) -> list[Path]:
    """The licence, notice and use policy files of a directory, by name."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.name.lower().startswith(LICENCE_FILES) and path.is_file()
    )


def licence_of_readme(directory: Path) -> str | None:
    """What the front matter of ``README.md`` says under ``license``.

    Hugging Face spells a licence that isn't on its list ``other``, with its name under
    ``license_name``.
    """
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        text = file.read(README_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return None
    front_matter = text[4:].split("\n---", maxsplit=1)[0]
    return _name(
        {key: value.strip() for key, value in _FIELD.findall(front_matter)}, "license_name"
    )


def licence_of_gguf(metadata: Mapping[str, object]) -> str | None:
    """What GGUF metadata says under ``general.license``."""
    stated = {
        "license": metadata.get("general.license"),
        "name": metadata.get("general.license.name"),
    }
    return _name({key: value for key, value in stated.items() if isinstance(value, str)}, "name")


def _name(stated: Mapping[str, str], name_key: str) -> str | None:
    licence = stated.get("license")
    return stated.get(name_key, licence) if licence == "other" else licence
