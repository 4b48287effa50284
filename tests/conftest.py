"""Fixtures that several packages share.

What needs torch is imported where it is used: the runtime's own tests start without it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import tokenizers

from tests.int8_cache import NO_NUMBER, Int8Cached, write_int8_cached
from tests.shared import Shared
from tests.tiny_model import byte_level_tokenizer, write_tiny_model

ROOT = Path(__file__).parents[1]
REAL_GGUF = ROOT / "artifacts" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# These take longest, and run first: begun late, one would leave the other process without work. The
# first makes the real model's bundle, for which the second needn't wait.
LONGEST = (
    "tests/laws/test_company.py",
    "tests/laws/test_ray.py",
    "tests/laws/test_memory.py",
    "tests/runtime/test_tensorrt_runner.py",
    "tests/runtime/test_tensorrt_build.py",
)
# The same examples in every run, on machines of any speed, and no folder of past ones.
hypothesis.settings.register_profile("caravan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("caravan")

# A shell's background job ignores Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared-folder",
        type=Path,
        help="an empty folder for what takes long to make, which several processes then share",
    )


def names_alone(path: Path) -> bool:
    return path.suffix == ".py" and "mark.alone" in path.read_text(encoding="utf-8")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For the few tests that run alone, don't import the other files, which takes long."""
    wanted = config.option.markexpr != "alone" or collection_path.is_dir()
    return None if wanted or names_alone(collection_path) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for path in {item.path for item in items if item.get_closest_marker("alone")}:
        if not names_alone(path):
            raise pytest.UsageError(f"{path}: write mark.alone here, else nobody runs these tests")
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes folders, each once for all who read them. Nobody may write into one."""
    given: Path | None = pytestconfig.getoption("shared_folder")
    return Shared(given or tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the runtime remembers about bundles out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real model that scripts/install fetches."""
    path = Path(os.environ.get("LLAMA_EXPORT_MODEL", REAL_GGUF))
    if not path.is_file():
        pytest.fail(f"{path} is missing: run scripts/fetch_model.py")
    return path


@pytest.fixture(scope="session")
def int8_cached(tmp_path_factory: pytest.TempPathFactory) -> Int8Cached:
    """A tiny graph whose keys and values have 8 bits. Read it only."""
    from llama_decoder.tiny import tiny_config

    config = tiny_config(head_dim=64, max_positions=512)
    folder = tmp_path_factory.mktemp("int8_cached")
    return write_int8_cached(folder, config, no_numbers=(NO_NUMBER,))


@pytest.fixture(scope="session")
def real_bundle(real_gguf: Path, shared: Shared) -> Path:
    """A bundle of the real model. Read it only: a change of a file would hurt other tests."""
    from llama_export.build import build_bundle

    return shared("real-bundle", lambda folder: build_bundle(real_gguf, folder))


@pytest.fixture(scope="session")
def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: ids 0 to 2 are <unk>, <s>, </s>, then 256 bytes."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(shared: Shared) -> Path:
    """A Hugging Face directory: a Llama of random weights, the byte tokenizer, a template."""

    def write(folder: Path) -> None:
        folder.mkdir()
        write_tiny_model(folder)

    return shared("tiny-model", write)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, shared: Shared) -> Path:
    """A bundle of the tiny model. Read it only."""
    from llama_export.build import build_bundle

    return shared("tiny-bundle", lambda folder: build_bundle(tiny_model, folder))
