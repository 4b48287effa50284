"""One server for the tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from llama_runtime.bundle import open_bundle, write_manifest
from tests.runtime.conftest import write_fake_bundle
from tests.runtime.server.serving import Serving, serving


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with room for tools, each of whose letters is a token, and with one end token."""
    bundle = write_fake_bundle(tmp_path_factory.mktemp("bundles") / "roomy", eos_token_id=257)
    manifest = open_bundle(bundle).manifest
    geometry = replace(manifest.geometry, max_positions=4096)
    write_manifest(bundle, replace(manifest, geometry=geometry))
    return bundle


@pytest.fixture(scope="module")
def server(roomy: Path) -> Iterator[Serving]:
    with serving(roomy, max_len=2048) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made
