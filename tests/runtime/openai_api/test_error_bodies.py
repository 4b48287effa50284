"""Errors have one shape, which the ``openai`` package turns into its own."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from llama_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    CaravanError,
    DeadlineError,
    QueueFullError,
    RequestError,
)
from llama_runtime.openai_api import ModelNotFoundError, error_body

LENGTH = "context_length_exceeded"
LONG = CapacityError("too long", param="max_tokens")
LONG_PROMPT = CapacityError("too long", param="prompt[3]")
TABLE: list[tuple[Exception, type[openai.APIStatusError], int, str | None, str | None]] = [
    (RequestError("n is wrong", param="n"), openai.BadRequestError, 400, None, "n"),
    (LONG, openai.BadRequestError, 400, LENGTH, "max_tokens"),
    (LONG_PROMPT, openai.BadRequestError, 400, LENGTH, "prompt[3]"),
    (CapacityError("too many", param="max_batch"), openai.BadRequestError, 400, None, "max_batch"),
    (ModelNotFoundError("x", ["m"]), openai.NotFoundError, 404, "model_not_found", "model"),
    (QueueFullError("full"), openai.RateLimitError, 429, "rate_limit_exceeded", None),
    (DeadlineError("late"), openai.InternalServerError, 504, "deadline_exceeded", None),
    (TimeoutError("late"), openai.InternalServerError, 504, "deadline_exceeded", None),
    (BackendError("failed"), openai.InternalServerError, 500, None, None),
    (CaravanError("given up"), openai.InternalServerError, 500, None, None),
    (ValueError("oops"), openai.InternalServerError, 500, None, None),
]  # fmt: skip


def raised(status: int, body: dict[str, object]) -> openai.APIStatusError:
    """What a caller of the official client gets."""

    def answer(_: Any) -> Any:
        return httpx2.Response(status, json=body)

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = openai.OpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", max_retries=0, http_client=transport
    )
    with pytest.raises(openai.APIStatusError) as caught:
        client.models.list()
    return caught.value


@pytest.mark.parametrize(("error", "kind", "status", "code", "param"), TABLE)
def test_a_client_gets_the_kind_of_error_that_it_is(
    error: Exception,
    kind: type[openai.APIStatusError],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    found = raised(*error_body(error))
    assert type(found) is kind
    assert (found.status_code, found.code, found.param) == (status, code, param)
    assert found.type
    if status != 500:
        assert str(error) in found.message


def test_all_four_fields_are_always_there() -> None:
    for error, *_ in TABLE:
        _, body = error_body(error)
        assert list(body) == ["error"]
        inner: Any = body["error"]
        assert list(inner) == ["message", "type", "param", "code"]
        assert inner["message"]
        json.dumps(body, ensure_ascii=False).encode("utf-8")


def test_what_went_wrong_inside_is_for_who_runs_it_only() -> None:
    for error in (BackendError("/secret/model failed"), BundleError("/secret"), OSError("/secret")):
        status, public = error_body(error)
        assert (status, "secret" in str(public)) == (500, False)
        assert "/secret" in str(error_body(error, public=False)[1])


def test_a_model_that_is_not_there_is_told_from_those_that_are() -> None:
    error = ModelNotFoundError("a\nb", ["one", "two"])
    assert str(error) == r"there is no model 'a\nb' here: ask for 'one' or 'two'"
