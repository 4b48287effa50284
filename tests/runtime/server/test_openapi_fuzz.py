"""What the server's document allows is answered as it says, and what it doesn't is refused.

``schemathesis`` asks what it makes of the document; ``scripts/prove_conformance`` asks more.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from scripts.conformance_document import closed, narrowed
from tests.runtime.server.serving import MODEL, Serving

VOCAB_SIZE = 256  # of letters; the tokens after them are special
NOT_HERE: list[Any] = [positive_data_acceptance]  # no schema knows what a context holds

load_all_checks()


@pytest.fixture(scope="module")
def document(server: Serving) -> Any:
    return closed(server.get("/openapi.json").json())


def statuses(
    server: Serving, document: Any, path: str, method: str, mode: GenerationMode, examples: int
) -> Counter[int]:
    """Ask as the document lets one ask, or as it doesn't, and check each answer against it."""
    found: Counter[int] = Counter()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    session = requests.Session()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        answer = case.call_and_validate(
            base_url=server.url,
            session=session,
            excluded_checks=NOT_HERE,
        )
        found[answer.status_code] += 1

    with session:
        ask()
    return found


POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.mark.parametrize("path", POSTS)
def test_what_is_allowed_is_answered(server: Serving, document: Any, path: str) -> None:
    less = narrowed(document, MODEL, VOCAB_SIZE)
    found = statuses(server, less, path, "post", GenerationMode.POSITIVE, 8)
    assert found[200] >= 2, f"else little was checked: {found}"


@pytest.mark.parametrize("path", POSTS[:2])
def test_what_is_not_allowed_is_refused(server: Serving, document: Any, path: str) -> None:
    found = statuses(server, document, path, "post", GenerationMode.NEGATIVE, 6)
    assert found[400] >= 2, f"else little was checked: {found}"


def test_what_takes_no_body_is_answered(server: Serving, document: Any) -> None:
    for path, item in document["paths"].items():
        if "get" in item:
            found = statuses(server, document, path, "get", GenerationMode.POSITIVE, 1)
            assert sum(found.values()), path
