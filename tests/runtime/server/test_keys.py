"""A key for every route but a few, compared without a hint, from a file that is a secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from llama_runtime.errors import RequestError
from llama_runtime.server import ServerSettings
from llama_runtime.server.app import app_of
from llama_runtime.server.keys import Keys, is_loopback, read_keys
from llama_runtime.server.shell import OPEN_PATHS
from tests.runtime.server.serving import Serving, serving

# The files of the page, which are the same for everybody; its numbers need a key.
OPEN = {
    *("/health", "/ready", "/ping"),
    *("/", "/page/page.css", "/page/page.js", "/page/slots.js", "/page/charts.js"),
    *("/page/prompt.js", "/page/text.js", "/page/icon.svg"),
}
KEYS = ("first-key-of-all", "second")


@pytest.fixture(scope="module")
def locked(roomy: Path) -> Iterator[Serving]:
    with serving(roomy, ServerSettings(api_keys=KEYS)) as running:
        yield running


@pytest.mark.parametrize(
    "authorization",
    [
        *(None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-key-of-al", KEYS[0]),
        *(f"Basic {KEYS[0]}", f"Bearer {KEYS[0]} {KEYS[1]}", f"Bearer {','.join(KEYS)}"),
        "Bearer é",
    ],
)
def test_every_other_route_needs_a_key(locked: Serving, authorization: str | None) -> None:
    """The table of routes is walked, and what is in no table too."""
    headers = {} if authorization is None else {"Authorization": authorization}
    app = app_of(locked.service)
    assert isinstance(app, Starlette)
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes) >= 9
    paths = [(method, route.path) for route in routes for method in route.methods or ()]
    for method, path in [
        *paths,
        ("GET", "/nothing"),
        ("POST", "/health/"),
        ("GET", "/v1/models/health"),
    ]:
        answer = locked.send(method, path, b"", headers)
        if path in OPEN_PATHS:
            assert answer.status == 200
            continue
        assert answer.status == 401, path
        if method != "HEAD":
            assert answer.error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert set(OPEN_PATHS) == OPEN
    assert "/page/state" in {path for _, path in paths}


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(locked: Serving, key: str) -> None:
    with locked.client(key) as client:
        assert client.completions.create(model="fake-llama", prompt="a", max_tokens=1).choices
    assert locked.get("/version", Authorization=f"bearer  {key}").status == 200
    with locked.client("other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_keys_are_compared_without_telling_how_far_they_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with each, all of one length, and none is left out after one that fits."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert Keys(KEYS).admit(f"Bearer {KEYS[0]}".encode())
    assert not Keys(KEYS).admit(b"Bearer no")
    assert len(compared) == 4
    assert {len(one) for pair in compared for one in pair} == {32}


def test_a_file_of_keys_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n  second \r\n")
    path.chmod(0o640)
    assert read_keys(path) == ("first", "second")


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("first\n", 0o644, "chmod o-rwx"),
        ("first\n", 0o602, "chmod o-rwx"),
        ("# none\n\n", 0o600, "holds no key"),
        ("a b\n", 0o600, "key 1 of"),
        ("é\n", 0o600, "not ASCII"),
        ("a" * 2**21, 0o600, "over 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_secret_or_holds_none_is_refused(
    tmp_path: Path, text: str, mode: int, words: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(RequestError, match=words) as refusal:
        read_keys(path)
    assert "first" not in str(refusal.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_is_known_by_all_of_its_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_other_addresses_are_none(host: str) -> None:
    assert not is_loopback(host)


def test_settings_show_no_key() -> None:
    assert "first" not in repr(ServerSettings(api_keys=KEYS))
