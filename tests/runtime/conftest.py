"""A bundle without a model: a byte-level tokenizer, a chat template and the ``Fake`` backend."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_runtime import loading
from llama_runtime.backends.fake import Fake
from llama_runtime.bundle import (
    Graph,
    Licence,
    Manifest,
    Source,
    describe_files,
    write_manifest,
)
from llama_runtime.contract import Geometry
from llama_runtime.llm import LLM
from llama_runtime.sampling import Reference

FAKE_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAKE_GEOMETRY = Geometry(
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=8,
    intermediate_size=8,
    vocab_size=258,
    max_positions=512,
)
# The way into `llama-run` with the fake backend, for runs in a process of their own. Each step
# takes as many seconds as the first argument says.
FAKE_LLAMA_RUN = """
import sys, time
from llama_runtime import loading
from llama_runtime.backends.fake import Fake
from llama_runtime.sampling import Reference

seconds = float(sys.argv.pop(1))

class SlowFake(Fake):
    def run(self, step):
        time.sleep(seconds)
        return super().run(step)

loading.open_session = lambda graph, threads: None
loading.OrtSampler = lambda *_: Reference()
loading.OrtCpu = lambda session, geometry, *, num_slots, capacity, num_prefix_blocks, **_: SlowFake(
    num_slots, capacity, geometry.vocab_size, num_prefix_blocks=num_prefix_blocks
)
from llama_runtime.__main__ import main
main()
"""


def write_fake_bundle(
    root: Path, *, chat: bool = True, max_positions: int = 512, **generation: Any
) -> Path:
    """A bundle that `open_bundle` takes, whose graph is empty."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    root.mkdir()
    tokenizer.save(str(root / "tokenizer.json"))
    # sixteen end tokens, so that many completions end before their last token
    config = {"eos_token_id": [257, *range(15)], **generation}
    (root / "generation_config.json").write_text(json.dumps(config))
    (root / "decoder.onnx").write_bytes(b"")
    (root / "sampler.onnx").write_bytes(b"")
    if chat:
        (root / "chat_template.jinja").write_text(FAKE_TEMPLATE)
    manifest = Manifest(
        name="fake-llama",
        created_by={"caravan": "0.1.0"},
        source=Source("gguf", "fake.gguf", "0" * 64),
        licence=Licence("apache-2.0", ()),
        geometry=replace(FAKE_GEOMETRY, max_positions=max_positions),
        graphs=(
            Graph("slots", "fp32", "decoder.onnx"),
            Graph("sampler", "fp32", "sampler.onnx"),
        ),
        special_tokens={"eos_token": "<|im_end|>"},
        verification={"greedy": {"agreement": 1.0}, "max_logit_difference": 2e-5},
        files=describe_files(root),
    )
    write_manifest(root, manifest)
    return root


def write_roomy_bundle(root: Path) -> Path:
    """One with room for tools, each of whose letters is a token, and with one end token."""
    return write_fake_bundle(root, max_positions=4096, eos_token_id=257)


@pytest.fixture
def fake_bundle(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "fake_bundle")


@pytest.fixture
def raw_bundle(tmp_path: Path) -> Path:
    """The same without a chat template, and with sampling of its own."""
    return write_fake_bundle(
        tmp_path / "raw_bundle", chat=False, do_sample=True, temperature=0.5, top_k=20
    )


def use_fakes(patch: pytest.MonkeyPatch, make: Callable[..., Fake] = Fake) -> None:
    """Have models in this process run on `Fake` backends, or on what is made in their place."""

    def backend(
        session: object,
        geometry: Geometry,
        *,
        num_slots: int,
        capacity: int,
        num_prefix_blocks: int,
        **_: object,
    ) -> Fake:
        return make(num_slots, capacity, geometry.vocab_size, num_prefix_blocks=num_prefix_blocks)

    patch.setattr(loading, "open_session", lambda *_: None)
    patch.setattr(loading, "OrtCpu", backend)
    patch.setattr(loading, "OrtSampler", lambda *_: Reference())


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` in this process runs on the `Fake` backend."""
    use_fakes(monkeypatch)


@pytest.fixture
def fake_llm(fake_backend: None, fake_bundle: Path) -> Iterator[LLM]:
    with LLM(fake_bundle, max_batch=4, max_len=256, threads=1) as loaded:
        yield loaded


@pytest.fixture
def fake_llama_run(tmp_path: Path, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The start of a command line: add the seconds of a step, then what `llama-run` takes."""
    script = tmp_path / "fake_llama_run.py"
    script.write_text(FAKE_LLAMA_RUN)
    monkeypatch.setenv("LLAMA_RUN_BUNDLE", os.fspath(fake_bundle))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # hides what a closed pipe does
    return [sys.executable, os.fspath(script)]
