"""`max_batch="auto"`: what it becomes at load, and an engine that obeys what is found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from click.testing import CliRunner, Result

from llama_runtime import loading
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.backends.fake import Fake
from llama_runtime.batch_sizer import LULL_STEPS, START, BatchSizer
from llama_runtime.cli import cli
from llama_runtime.contract import cache_capacity
from llama_runtime.cuda_loading import CUDA_AUTO_MAX_BATCH
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.llm import LLM
from llama_runtime.machine import Memory
from llama_runtime.params import SamplingParams
from llama_runtime.settings import AUTO_MAX_BATCH, Settings
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step

VOCAB_SIZE, MAX_LEN, MAX_CHUNK, SLOTS = 512, 200, 64, 128
Cost = Callable[[int], float]


class Clocked(Fake):
    """The fake, whose steps take a time of a clock that stands still otherwise.

    Attributes:
        now: what the clock shows, in seconds.
        most: sequences of the largest step that decoded.
    """

    def __init__(self, num_slots: int, cost: Cost) -> None:
        super().__init__(num_slots, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE)
        self.now = 0.0
        self.most = 0
        self._cost = cost

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        if step.unpack.shape[1] == 1:
            self.most = max(self.most, len(step.chunks))
        self.now += self._cost(len(step.chunks))
        return super().run(step)


@pytest.fixture(scope="module")
def table(byte_tokenizer: tokenizers.Tokenizer) -> TokenBytes:
    return TokenBytes(byte_tokenizer)


@pytest.fixture
def make(table: TokenBytes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def make(backend: Fake, sizer: BatchSizer | None, slots: int = SLOTS, **options: Any) -> Engine:
        engine = slots_engine(
            backend,
            table,
            [2],
            vocab_size=VOCAB_SIZE,
            max_batch=slots,
            max_len=MAX_LEN,
            prompt_budget=4 * MAX_CHUNK,
            max_chunk=MAX_CHUNK,
            batch_sizer=sizer,
            **options,
        )
        if isinstance(backend, Clocked):
            monkeypatch.setattr(engine, "_clock", lambda: backend.now)
        return engine

    return make


def add(engine: Engine | EngineGroup, number: int, max_tokens: int = 24) -> list[int]:
    """So many requests of different lengths, drawn at random from seeds of their own."""
    return [
        engine.add(
            [i % 500 + 3, 7, i % 31 + 3],
            SamplingParams(max_tokens=max_tokens + i % 7, ignore_eos=True, temperature=1.0, seed=i),
        ).id
        for i in range(number)
    ]


def finish(engine: Engine | EngineGroup) -> dict[int, list[int | None]]:
    tokens: dict[int, list[int | None]] = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.sequence_id, []).append(event.token_id)
        engine.check()
    return tokens


def cheap(count: int) -> float:
    return 0.02 + 0.001 * count


def dear(count: int) -> float:
    """Nothing is gained beyond the size at which every search begins."""
    return 0.02 + 0.001 * count + 0.01 * max(0, count - START)


# --- an engine ----------------------------------------------------------------------------------


def test_the_batch_grows_with_the_queue_and_shrinks_when_it_is_gone(
    make: Callable[..., Engine],
) -> None:
    backend = Clocked(SLOTS, cheap)
    engine = make(backend, BatchSizer(SLOTS))
    assert engine.counters().batch_limit == START
    add(engine, 400)
    finish(engine)
    grown = engine.counters()
    assert backend.most == SLOTS
    assert [decision.limit for decision in grown.batch_decisions][:2] == [64, 128]
    for _ in range(4 * LULL_STEPS // 24):
        add(engine, 1)
        finish(engine)
    assert engine.counters().batch_limit == START
    assert "nobody waited" in engine.counters().batch_decisions[-1].reason


def test_no_step_is_larger_than_the_limit(make: Callable[..., Engine]) -> None:
    engine = make(Fake(8, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE), Fixed(3), slots=8)
    add(engine, 20)
    while engine.has_work:
        assert engine.num_running <= 3
        engine.step()


class Fixed(BatchSizer):
    """Stays where it is, and notes what it is told."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.told: list[tuple[int, int, float, bool]] = []

    def observe(self, num_streams: int, num_tokens: int, seconds: float, *, waits: bool) -> None:
        self.told.append((num_streams, num_tokens, seconds, waits))


def test_steps_that_move_streams_are_told_and_prompts_are_not(
    make: Callable[..., Engine],
) -> None:
    backend, sizer = Clocked(8, lambda count: 1.0 * count), Fixed(4)
    engine = make(backend, sizer, slots=8)
    for _ in range(6):  # four and two prompts, which end in tokens too, and in steps of their own
        engine.add([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    finish(engine)
    assert sizer.told == [(4, 4, 4.0, True)] * 2 + [(2, 2, 2.0, False)] * 2


def test_a_size_that_gains_nothing_is_left_again(make: Callable[..., Engine]) -> None:
    backend = Clocked(SLOTS, dear)
    engine = make(backend, BatchSizer(SLOTS))
    add(engine, 400)
    finish(engine)
    assert [decision.limit for decision in engine.counters().batch_decisions][:2] == [64, START]


def test_tokens_are_those_of_a_fixed_batch(make: Callable[..., Engine]) -> None:
    told = []
    for sizer, cost in ((None, cheap), (BatchSizer(SLOTS), cheap), (BatchSizer(SLOTS), dear)):
        engine = make(Clocked(SLOTS, cost), sizer)
        add(engine, 300)
        told.append(finish(engine))
    assert told[0] == told[1] == told[2]
    assert len({tuple(tokens) for tokens in told[0].values()}) > 250


def test_each_engine_of_a_group_grows_with_the_common_queue(
    make: Callable[..., Engine],
) -> None:
    ids = count()
    backends = [Clocked(SLOTS, cheap) for _ in range(2)]
    group = EngineGroup([make(backend, BatchSizer(SLOTS), ids=ids) for backend in backends])
    add(group, 700)
    finish(group)
    assert [backend.most for backend in backends] == [SLOTS, SLOTS]


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def has(num_bytes: int) -> None:
        found = Memory(num_bytes, "a test")
        monkeypatch.setattr(loading, "available_memory", lambda **_: found)

    return has


def test_there_are_as_many_slots_as_memory_allows(
    fake_bundle: Path, memory: Callable[[int], None]
) -> None:
    memory(10**12)
    assert LLM.plan(fake_bundle, max_batch="auto").max_batch == AUTO_MAX_BATCH == 128
    fifty = LLM.plan(fake_bundle, max_batch=50, max_len=500, prefix_tokens=0)
    memory(fifty.total)
    found = LLM.plan(fake_bundle, max_batch="auto", max_len=500, prefix_tokens=0)
    assert found.max_batch == found.largest_max_batch == 50
    found.check()


def test_the_length_is_chosen_for_the_usual_batch_first(
    fake_bundle: Path, memory: Callable[[int], None]
) -> None:
    memory(LLM.plan(fake_bundle, max_batch=32, max_len=512).total)
    found = LLM.plan(fake_bundle, max_batch="auto")
    assert (found.max_len, found.max_batch) == (512, 32)


def test_what_fits_with_no_batch_at_all_is_refused_with_the_usual_advice(
    fake_bundle: Path, memory: Callable[[int], None]
) -> None:
    memory(1000)
    with pytest.raises(CapacityError, match="the model itself doesn't fit"):
        LLM.plan(fake_bundle, max_batch="auto").check()


@pytest.mark.parametrize("wrong", ["many", "AUTO", "", "8", 0, 1025, True])
def test_other_words_are_refused(fake_bundle: Path, wrong: Any) -> None:
    with pytest.raises(RequestError, match="max_batch must lie in 1 to 1024") as caught:
        LLM.plan(fake_bundle, max_batch=wrong)
    assert caught.value.param == "max_batch"


def test_slots_and_the_limit_are_visible(fake_backend: None, fake_bundle: Path) -> None:
    with LLM(fake_bundle, max_batch="auto", max_len=64, threads=1) as llm:
        assert llm.max_batch == 128
        assert llm.stats().batch_limit == START
        assert llm.stats().batch_decisions == ()
        assert len(llm.generate(["a"] * 300, SamplingParams(max_tokens=20))) == 300
    with LLM(fake_bundle, max_batch=8, max_len=64, threads=1) as llm:
        assert (llm.max_batch, llm.stats().batch_limit) == (8, 8)


def test_asyncio_has_it_too(fake_backend: None, fake_bundle: Path) -> None:
    llm = AsyncLLM(fake_bundle, max_batch="auto", max_len=64, threads=1)
    assert llm.max_batch == 128


def test_tensorrt_is_built_for_a_number(fake_bundle: Path) -> None:
    from llama_runtime.bundle import open_bundle

    device: Any = object()
    wrong = r"max_batch must be left out, not 'auto': a TensorRT engine is built for a number"
    with pytest.raises(RequestError, match=wrong) as caught:
        loading._plan_tensorrt(open_bundle(fake_bundle), Settings(max_batch="auto"), [device])
    assert caught.value.param == "max_batch"


# --- the command --------------------------------------------------------------------------------


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_batch_takes_auto(fake_backend: None, fake_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(200)))
    args = ("batch", prompts, "--bundle", fake_bundle, "--max-tokens", 5, "--seed", 1, "-o", "-")
    auto, fixed = run(*args, "--max-batch", "auto"), run(*args)
    assert (auto.exit_code, auto.stdout) == (0, fixed.stdout)
    assert "max_batch 128, max_len " in auto.stderr


def test_plan_takes_auto(fake_bundle: Path) -> None:
    result = run("plan", "--bundle", fake_bundle, "--max-batch", "auto")
    assert result.output.startswith("max_batch 128, max_len 512\n")


@pytest.mark.parametrize("wrong", ["many", "0", "-1", "1.5", "auto ", ""])
def test_a_wrong_value_is_a_usage_error(fake_bundle: Path, wrong: str) -> None:
    result = run("plan", "--bundle", fake_bundle, "--max-batch", wrong)
    assert result.exit_code == 2
    message = f"Invalid value for '--max-batch': {wrong!r} must be a number from 1 on, or auto"
    assert message in result.stderr


def test_the_help_says_how_many_slots_auto_has() -> None:
    text = " ".join(run("batch", "--help").stdout.split())
    assert f"up to {AUTO_MAX_BATCH}, and {CUDA_AUTO_MAX_BATCH} on CUDA, as memory" in text
