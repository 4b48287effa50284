"""An engine over the ``tensorrt`` dialect on stand-ins, and what it should tell, by numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llama_runtime.backends import cuda_sampler
from llama_runtime.backends.tensorrt_runner import TensorRtRunner
from llama_runtime.chunk import Chunk
from llama_runtime.contract import Geometry
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.events import TokenEvent
from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.new_sequence import new_sequence
from llama_runtime.params import SamplingParams
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Reference
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.stopping import finish_reason
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt_engine import engine_of
from tests.numpy_llama import NumpyLlama
from tests.recording_cuda import RecordingDevice
from tests.recording_tensorrt import RecordingEngine
from tests.tiny_model import byte_level_tokenizer

TABLE = TokenBytes(byte_level_tokenizer())
VOCAB_SIZE = 259
END_TOKENS = frozenset(range(2, 10))  # so that one sequence in a few ends early
MAX_LEN = 128  # which is the capacity too


class Told(NamedTuple):
    """What a caller learns of a sequence."""

    token_ids: list[int]
    reason: str | None
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None]


class Model:
    """A graph on disk, and the same model in numpy.

    Args:
        folder: where the graph goes.
    """

    def __init__(self, folder: Path) -> None:
        from llama_decoder.tiny import random_weights, tiny_config
        from tests.tensorrt_graph import tiny_tensorrt_graph

        config = tiny_config(vocab_size=VOCAB_SIZE)
        self.geometry: Geometry = config.geometry
        self.graph = tiny_tensorrt_graph(config, 0, folder)
        names = {
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
        }
        weights = {name: w.astype(np.float64) for name, w in random_weights(config, 0).items()}
        self.numpy = NumpyLlama(names, weights)

    def alone(
        self,
        prompt: list[int],
        params: SamplingParams,
        end_tokens: frozenset[int] = END_TOKENS,
        grammars: GrammarCompiler | None = None,
    ) -> Told:
        """What the sequence should be told, without a cache, an engine or neighbours."""
        seq = new_sequence(
            prompt,
            params,
            0,
            ids=count(),
            token_bytes=TABLE,
            vocab_size=VOCAB_SIZE,
            max_len=MAX_LEN,
            grammars=grammars,
        )
        sampler = Sampler(Reference(), end_tokens)
        if params.prompt_logprobs:
            rows = self.numpy.logits(prompt)[:-1].astype(np.float32)
            wanted = np.array(prompt[1:], np.int64)
            tops = [params.top_logprobs] * len(rows)
            scores = sampler.score(rows, wanted, tops) if len(rows) else []
            seq.prompt_logprobs = [None, *scores]
        reason = None
        while reason is None:
            row = self.numpy.logits(seq.token_ids)[-1:].astype(np.float32)
            masks: Masks = np.full((1, mask_words(VOCAB_SIZE)), -1, np.int32)
            if seq.matcher is not None:
                MaskFiller(1).fill([(0, seq.matcher, ())], masks)
            (token,), (logprob,) = sampler.sample(row, [Chunk(seq, seq.num_tokens)], masks)
            seq.append(token)
            seq.logprobs += [logprob] if logprob else []
            reason = finish_reason(seq, end_tokens)
            if seq.matcher is not None and reason != "stop":
                seq.matcher.accept(token)
                reason = "stop" if seq.matcher.is_complete else reason
        return Told(seq.completion_token_ids, reason, seq.logprobs, seq.prompt_logprobs)


@dataclass
class Asked:
    """A request under way, and its events."""

    seq: Sequence
    prompt: list[int]
    params: SamplingParams
    events: list[TokenEvent]


class Recorded:
    """An engine on stand-ins, and everything that it has told."""

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 4,
        max_len: int = MAX_LEN,
        prompt_budget: int | None = None,
        end_tokens: frozenset[int] = END_TOKENS,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.grammars = grammars
        self.model = model
        self.end_tokens = end_tokens
        self.limits = EngineLimits(max_batch, max_len)
        self.device = RecordingDevice()
        self.contexts = RecordingEngine(model.graph, model.geometry, self.limits, self.device)
        with pytest.MonkeyPatch.context() as patch:  # the stand-ins' kernels need no compiler
            patch.setattr(cuda_sampler, "machine_code", lambda *_: b"")
            self.engine: Engine = engine_of(
                self.contexts,
                model.geometry,
                self.limits,
                self.device,
                TABLE,
                end_tokens,
                dtype="float32",
                prompt_budget=prompt_budget,
                grammars=grammars,
            )
        self.asked: dict[int, Asked] = {}

    @cached_property
    def runner(self) -> TensorRtRunner:
        runner: Any = self.engine._runner
        assert isinstance(runner, TensorRtRunner)
        return runner

    def add(self, prompt: list[int], **params: Any) -> Sequence:
        made = SamplingParams(**params)
        seq = self.engine.add(prompt, made)
        self.asked[seq.id] = Asked(seq, prompt, made, [])
        return seq

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for event in self.engine.step():
                self.asked[event.sequence_id].events.append(event)
            self.engine.check()

    def drain(self) -> None:
        """Step until nothing is left, and compare all that was told with what should have been."""
        while self.engine.has_work:
            self.step()
        assert self.engine.failure is None
        assert self.device.violations == []
        for asked in self.asked.values():
            self.compare(asked)

    def compare(self, asked: Asked) -> None:
        seq = asked.seq
        told = self.model.alone(asked.prompt, asked.params, self.end_tokens, self.grammars)
        if seq.finish_reason == "abort":
            assert seq.completion_token_ids == told.token_ids[: seq.num_completion_tokens]
            return
        assert (seq.completion_token_ids, seq.finish_reason) == (told.token_ids, told.reason)
        assert [event.token_id for event in asked.events] == told.token_ids
        assert_alike(seq.logprobs, told.logprobs)
        assert_alike(seq.prompt_logprobs, told.prompt_logprobs)

    def slot(self, pool: int, slot: int) -> Any:
        """Keys or values of a slot, as they lie on the device."""
        cells = self.model.geometry.num_kv_heads, self.limits.capacity, self.model.geometry.head_dim
        address = self.runner._pools[pool] + slot * self.runner._slot_bytes
        return self.device.array(address, "f4", *cells)


def assert_alike(told: list[Any], expected: list[Any]) -> None:
    """The same tokens, and log-probabilities that differ by rounding."""
    assert len(told) == len(expected)
    for a, b in zip(told, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)
