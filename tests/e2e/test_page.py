"""The page in a real Chromium, over a server whose model takes its time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from llama_runtime.server import ServerSettings
from tests.browser import Tab, browser_tab, find_chromium
from tests.runtime.conftest import write_roomy_bundle
from tests.runtime.server.serving import Serving, serving, stream_bytes

CHROMIUM = find_chromium()
if CHROMIUM is None:
    pytest.skip(
        "no Chromium on this machine: install Debian's chromium, or name one in CHROMIUM",
        allow_module_level=True,
    )
SHOWN = "!document.getElementById('main').hidden"
BUSY = "document.querySelectorAll('#slots .busy').length"
WIDTHS = """[...document.querySelectorAll('#slots .busy .done')].map(
    (one) => one.getBoundingClientRect().width)"""
ANSWER = "document.getElementById('answer').textContent"
NOTE = "document.getElementById('answer-note').textContent"
MAX_LEN = 2048


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_roomy_bundle(tmp_path_factory.mktemp("bundles") / "page")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert CHROMIUM is not None
    with browser_tab(CHROMIUM, tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """The browser, on a page of its own; nothing goes wrong there, and nothing leaves it."""
    browser.open("about:blank")
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.prefer(prefers_color_scheme="light")
    yield browser
    assert browser.errors == []
    origins = {url.split("/")[2] for url in browser.requests if url.startswith("http")}
    assert len(origins) == 1, browser.requests


@contextmanager
def slow_server(
    bundle: Path, settings: ServerSettings | None = None, max_batch: int = 4
) -> Iterator[Serving]:
    with serving(bundle, settings, max_batch=max_batch, max_len=MAX_LEN) as server:
        server.backend.seconds = 0.02
        yield server


@contextmanager
def streams(server: Serving, count: int, max_tokens: int = 1500) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(server.connect())
            client.sendall(stream_bytes(max_tokens))
        yield


def test_slots_fill_while_requests_stream_and_empty_when_they_go(bundle: Path, tab: Tab) -> None:
    with slow_server(bundle) as server:
        tab.open(server.url)
        tab.wait_for(SHOWN)
        assert tab.text("#slots-note") == "0 of 4 in use"
        assert tab.text("#queue-note") == "Nothing waits for a slot"
        assert tab.text("#model") == "fake-llama"
        assert tab.text("#state") == "Takes requests"
        with streams(server, 6):
            tab.wait_for(f"{BUSY} === 4")
            tab.wait_for("document.querySelectorAll('#queue li').length === 2")
            assert tab.text("#queue-note") == "2 sequences wait for a slot"
            tab.wait_for(f"Math.min(...{WIDTHS}) > 10")
            before = tab.run("document.querySelector('#slots .what').textContent")
            assert re.fullmatch(r"\d+ tokens", before)
            tab.wait_for(
                f"parseInt(document.querySelector('#slots .what').textContent) > "
                f"{int(before.split()[0])}"
            )
            tab.wait_for("parseFloat(document.querySelector('#out .value').textContent) > 20")
            tab.wait_for("document.querySelector('#between .value').textContent.includes(' ms')")
            assert tab.run("document.querySelector('#between path.first').getAttribute('d')")
            records = {call.id for call in server.service.activity.calls}
            shown = tab.run(
                "[...document.querySelectorAll('#slots .busy .request, #queue .request')].map("
                "(one) => one.textContent)"
            )
            assert set(shown) == records
        tab.wait_for(f"{BUSY} === 0")
        assert tab.text("#slots-note") == "0 of 4 in use"


def test_a_prompt_is_sent_by_the_keyboard_streams_and_is_stopped(bundle: Path, tab: Tab) -> None:
    with slow_server(bundle) as server:
        tab.open(server.url)
        tab.wait_for(SHOWN)
        tab.focus("#prompt")
        tab.type("Hello")
        tab.press("Enter")
        assert tab.run("document.getElementById('prompt').value") == "Hello\n"
        tab.run("document.getElementById('max-tokens').value = 30")
        tab.run("document.getElementById('temperature').value = 0")
        tab.press("Enter", ctrl=True)
        tab.wait_for(f"{NOTE}.includes('30 tokens')")
        with server.client() as client:
            said = client.chat.completions.create(
                model="fake-llama",
                messages=[{"role": "user", "content": "Hello\n"}],
                max_tokens=30,
                temperature=0,
            )
        assert tab.run(ANSWER) == said.choices[0].message.content
        assert "as long as asked" in tab.run(NOTE)

        tab.run("document.querySelector('[value=completion]').click()")
        tab.run("document.getElementById('max-tokens').value = 1500")
        tab.focus("#max-tokens")
        tab.press("Enter")
        tab.wait_for(f"{NOTE}.startsWith('First token')")
        assert tab.run("document.getElementById('send').disabled")
        assert tab.run("document.getElementById('answer').getAttribute('aria-busy')") == "true"
        tab.wait_for(f"{ANSWER}.length > 5")
        tab.press("Escape")
        tab.wait_for(f"{NOTE} === 'Stopped'")
        server.wait_until_idle()
        assert not tab.run("document.getElementById('send').disabled")
        paths = {url.removeprefix(server.url) for url in tab.requests}
        assert {"/v1/chat/completions", "/v1/completions"} <= paths

        server.backend.failure = MemoryError("no more")
        tab.press("Enter")
        tab.wait_for(f"{NOTE}.startsWith('It failed: ')")
        assert "Traceback" not in tab.run(NOTE)
    tab.wait_for("document.getElementById('state').textContent.startsWith('No answer')")
    assert all("Failed to load resource" in one for one in tab.errors)
    tab.errors.clear()  # the browser's own words for the 500, and for the server that has gone


def test_a_key_is_asked_for_and_kept_nowhere(bundle: Path, tab: Tab) -> None:
    with slow_server(bundle, ServerSettings(api_keys=("right-key",))) as server:
        tab.open(server.url)
        tab.wait_for("!document.getElementById('key-form').hidden")
        assert tab.run("document.activeElement.id") == "key"
        assert not tab.run(SHOWN)
        tab.type("wrong-key")
        tab.press("Enter")
        tab.wait_for("document.getElementById('key-error').textContent.includes('know this key')")
        assert not tab.run(SHOWN)
        (refused,) = tab.errors
        assert "401" in refused
        tab.errors.clear()
        tab.type("right-key")
        tab.press("Enter")
        tab.wait_for(SHOWN)
        tab.focus("#prompt")
        tab.type("Hello")
        tab.press("Enter", ctrl=True)
        tab.wait_for(f"{ANSWER}.length > 0")
        kept = tab.run(
            "JSON.stringify([location.href, document.cookie, {...localStorage}, "
            "{...sessionStorage}, document.documentElement.outerHTML])"
        )
        assert "right-key" not in kept
        assert "right-key" not in json.dumps(tab.requests)
        tab.press("Escape")
        server.wait_until_idle()


@pytest.mark.parametrize("slots", [4, 128])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_read_on_a_phone_in_light_and_dark(
    bundle: Path, tab: Tab, slots: int, scheme: str
) -> None:
    with slow_server(bundle, max_batch=slots) as server:
        tab.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        tab.resize(390, 844)
        tab.open(server.url)
        tab.wait_for(SHOWN)
        with streams(server, 3):
            tab.wait_for(f"{BUSY} === 3")
            tab.wait_for(f"Math.min(...{WIDTHS}) > 2")
            assert tab.run("document.querySelectorAll('#slots li').length") == slots
            assert tab.run("document.documentElement.scrollWidth") <= 390, "it scrolls sideways"
            for one in (
                "body",
                "#slots-note",
                "#slots .busy .what",
                ".lead",
                "#send",
                "figcaption",
            ):
                assert tab.run(f"({CONTRAST})(document.querySelector({one!r}))") >= 4.5, one
            background = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(253, 252, 250)") == (scheme == "light")
            motion = "getComputedStyle(document.querySelector('.busy .done')).transitionDuration"
            assert tab.run(motion) == "0s"
            smallest = tab.run(
                "Math.min(...['#slots .busy .what', '.peak', 'label'].map((one) => "
                "parseFloat(getComputedStyle(document.querySelector(one)).fontSize)))"
            )
            assert smallest >= 11


# How much an element's text stands out from what is behind it, by WCAG 2.
CONTRAST = """(element) => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((one) => one / 255).map(
        (one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4
    ).reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
    let behind = element;
    while ((numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) {
        behind = behind.parentElement;
    }
    const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
    const [low, high] = pair.map(light).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""


def test_the_keyboard_reaches_all_that_can_be_used(bundle: Path, tab: Tab) -> None:
    with slow_server(bundle) as server:
        tab.open(server.url)
        tab.wait_for(SHOWN)
        reached = []
        for _ in range(6):
            tab.press("Tab")
            reached.append(
                tab.run(
                    "document.activeElement.id || document.activeElement.className "
                    "|| document.activeElement.value"
                )
            )
            seen = "getComputedStyle(document.activeElement)"
            assert tab.run(f"{seen}.outlineStyle !== 'none' && {seen}.outlineWidth !== '0px'")
        assert reached == ["skip", "chat", "prompt", "max-tokens", "temperature", "send"]
