"""One server for the tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.runtime.conftest import write_roomy_bundle
from tests.runtime.server.serving import Serving, serving


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_roomy_bundle(tmp_path_factory.mktemp("bundles") / "roomy")


@pytest.fixture(scope="module")
def server(roomy: Path) -> Iterator[Serving]:
    with serving(roomy, max_len=2048) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made
