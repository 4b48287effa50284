"""The licence that a model's publisher states."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_decoder.licence import licence_files, licence_of_gguf, licence_of_readme


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, None),
        ("# A model\nlicense: mit\n", None),
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\r\nlanguage: en\r\nlicense: 'llama3.2'\r\n---\r\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: tiny-licence\n---\n", "tiny-licence"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags:\n- a\n---\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_what_the_front_matter_states(
    tmp_path: Path, readme: str | None, licence: str | None
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme.encode())
    assert licence_of_readme(tmp_path) == licence


def test_licence_files_are_found(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"):
        (tmp_path / name).write_text("text")
    found = [path.name for path in licence_files(tmp_path)]
    assert found == ["LICENSE.txt", "NOTICE", "USE_POLICY.md"]


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({}, None),
        ({"general.license": "mit"}, "mit"),
        ({"general.license": ["mit"]}, None),
        ({"general.license": "other", "general.license.name": "tiny-licence"}, "tiny-licence"),
        ({"general.license": "mit", "general.license.name": "The MIT License"}, "mit"),
    ],
)
def test_the_licence_of_a_gguf_is_what_its_metadata_states(
    metadata: dict[str, object], licence: str | None
) -> None:
    assert licence_of_gguf(metadata) == licence
