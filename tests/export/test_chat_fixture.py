"""A bundle brings prompts of the reference, which is what ``transformers`` renders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llama_export.build import build_bundle
from llama_export.bundle_checks import verify_bundle
from llama_export.chat_fixture import CONVERSATIONS, NOW, make_fixture
from llama_export.errors import ExportError
from llama_export.template_reference import render_cases
from llama_runtime.bundle import describe_file, open_bundle
from llama_runtime.chat_fixture import ChatFixture
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.conversation import read_conversation
from llama_runtime.errors import BundleError
from llama_runtime.prompt_encoder import PromptEncoder
from tests.runtime.chat_templates import SPECIAL_TOKENS, TEMPLATES, TRAINING

ODD = {
    "a namespace of its own": "{% set n = namespace(self=1) %}{% set n.b = 2 %}{{ n.self + n.b }}",
    "a namespace with a secret": "{% set n = namespace(_a=1) %}",
    "a secret in a namespace": "{% set n = namespace() %}{% set n._a = 1 %}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys([1]) }}{{ dict([(1, 2)]) }}",
    "attributes of dict": "{{ dict.__class__ }}",
    "a changed message": "{{ messages.append(1) }}",
    "JSON": "{{ messages|tojson }}{{ tools|tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
    "separators": "{{ messages|tojson(separators=(',', ':')) }}",
    "documents": "{{ documents is none }}{{ nothing is defined }}",
    "an exception": "{{ raise_exception('no') }}",
    "a wrong type": "{{ 'a' + none }}",
}
CORPUS = {**TEMPLATES, "training": TRAINING, **ODD}

Message = dict[str, Any]


@pytest.mark.parametrize("name", CORPUS)
def test_the_reference_renders_what_transformers_renders(name: str) -> None:
    now = datetime.now()
    conversations = [read_conversation(*one) for one in CONVERSATIONS.values()]
    for opened in (True, False):
        cases = [
            dataclasses.asdict(one) | {"add_generation_prompt": opened} for one in conversations
        ]
        prompts = render_cases(CORPUS[name], SPECIAL_TOKENS, now, cases)
        for conversation, prompt in zip(conversations, prompts, strict=True):
            try:
                (expected,), _ = render_jinja_template(
                    conversations=[conversation.messages],
                    tools=conversation.tools,
                    chat_template=CORPUS[name],
                    add_generation_prompt=opened,
                    **SPECIAL_TOKENS,
                )
            except (jinja2.TemplateError, TypeError):
                expected = None
            assert prompt == expected


@pytest.mark.parametrize("name", [*TEMPLATES, "training"])
def test_the_runtime_renders_the_fixture_of_every_template(name: str) -> None:
    fixture = make_fixture(CORPUS[name], SPECIAL_TOKENS)
    read = ChatFixture.from_json(fixture.to_json())
    assert read == fixture
    prompts = {case.name: case.prompt for case in read.cases}
    assert len(prompts) == len(CONVERSATIONS) >= 12
    assert "Hello!" in str(prompts["a question"])
    read.check(ChatTemplate(CORPUS[name], SPECIAL_TOKENS))


def test_a_template_that_asks_for_the_time_gets_that_of_the_fixture() -> None:
    source = "{{ strftime_now('%d %b %Y %H:%M:%S') }}"
    fixture = make_fixture(source, {})
    assert {case.prompt for case in fixture.cases} == {"01 Mar 2025 09:05:07"}
    year = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([{"role": "user", "content": ""}])
    assert int(year) > NOW.year


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x {{ 1e20 }}", r"'a question' as .*: from character 3 on it has '0000.*, not 'e\+20'"),
        ("{{ messages[0].content.swapcase() }}", "'a question' .*: it refuses the conversation"),
        (
            "{% if messages|length > 1 and messages[0].role == 'user' %}{{ 1e20 }}{% endif %}",
            "'turns without a system message'",
        ),
        ("{% if tools %}{{ 1e20 }}{% endif %}", "'tools'"),
        ("{{ 'a'|nonsense }}", "can't be rendered by jinja2: .*No filter named 'nonsense'"),
    ],
)
def test_a_template_that_the_runtime_renders_otherwise_is_not_built(
    source: str, words: str
) -> None:
    with pytest.raises(ExportError, match=words) as error:
        make_fixture(source, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "costs"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * 10**7 }}", "the prompts have more than 131,072 characters"),
        # runs in the reference alone: the runtime refuses the filter before the loop
        (
            "{{ 'a'|wordcount }}{% for a in range(99999) %}{{ range(9999)|sum }}{% endfor %}",
            "costs",
        ),
    ],
)
def test_a_template_bomb_ends_the_build_and_not_the_machine(source: str, words: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ExportError, match=f"can't be rendered by jinja2: .*{words}"):
        make_fixture(source, {})
    assert time.perf_counter() - start < 30


def change(bundle: Path, name: str, text: str) -> None:
    """Write a file of a bundle, and say in the manifest that it was always so."""
    (bundle / name).write_text(text, encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = dataclasses.asdict(describe_file(bundle / name))
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_brings_the_prompts_of_its_template(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert "chat_fixture.json" in bundle.manifest.files
    fixture = ChatFixture.from_json(bundle.chat_fixture or "")
    prompt = {case.name: case.prompt for case in fixture.cases}["a question"]
    assert prompt == "<s>user: Hello!</s><s>assistant: "


def test_a_template_that_writes_other_prompts_than_when_it_was_built_is_refused(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    source = open_bundle(bundle).chat_template or ""
    change(bundle, "chat_template.jinja", source.replace("assistant: ", "assistant:"))
    words = r"doesn't write the conversation 'a question' as .*: from character 32 on it has ''"
    with pytest.raises(BundleError, match=words):
        PromptEncoder(open_bundle(bundle))
    with pytest.raises(ExportError, match=words):
        verify_bundle(bundle, tiny_model)
    change(bundle, "chat_template.jinja", source)
    PromptEncoder(open_bundle(bundle))


def test_a_bundle_without_prompts_opens_as_before(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_fixture.json").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["chat_fixture.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert open_bundle(bundle).chat_fixture is None
    assert PromptEncoder(open_bundle(bundle)).has_chat_template


def test_a_model_whose_template_is_rendered_otherwise_is_not_built(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content.swapcase() }}")
    with pytest.raises(ExportError, match=r"can't use this model's chat template: .*'a question'"):
        build_bundle(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 10**5,
        '{"rendered_by": "x", "now": "yesterday", "cases": []}',
        '{"rendered_by": "x", "now": "2025-01-01", "cases": [{"name": "a"}]}',
        '{"rendered_by": "x", "now": "2025-01-01", "cases": 3}',
        '{"rendered_by": "x", "now": 3, "cases": []}',
    ],
)
def test_what_is_no_fixture_is_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError, match=r"chat_fixture\.json is not what llama-export build"):
        ChatFixture.from_json(text)


def test_a_fixture_that_costs_too_much_is_refused() -> None:
    case = make_fixture("a", {}).cases[0]
    many = ChatFixture("x", NOW, [case] * 65)
    with pytest.raises(BundleError, match="has 65 cases; 64 is the limit"):
        ChatFixture.from_json(many.to_json())
