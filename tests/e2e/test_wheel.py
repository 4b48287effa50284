"""The wheel and the sdist hold what the checkout holds, and no more.

They are built by the back end that is installed here, so that nothing is fetched;
scripts/check_wheel installs them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.check_wheel_contents import (
    build,
    sdist_contents,
    sdist_faults,
    wheel_contents,
    wheel_faults,
)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="what belongs to the checkout is what git says"
)
Contents = dict[str, bytes]
CSS = "llama_runtime/server/page/page.css"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def wheel(built: tuple[Path, Path]) -> Contents:
    return wheel_contents(built[0])


def test_the_wheel_holds_the_packages_and_says_what_pyproject_says(wheel: Contents) -> None:
    assert list(wheel_faults(wheel)) == []


def test_the_sdist_holds_all_that_the_checkout_needs(built: tuple[Path, Path]) -> None:
    contents = sdist_contents(built[1])
    assert list(sdist_faults(contents)) == []
    del contents["scripts/check"]
    contents["artifacts/model.gguf"] = b""
    assert list(sdist_faults(contents)) == [
        "the sdist holds a file that the checkout doesn't: artifacts/model.gguf",
        "the sdist lacks a file of the checkout: scripts/check",
    ]


def in_metadata(name: str, change: Callable[[bytes], bytes]) -> Callable[[Contents], None]:
    def damage(contents: Contents) -> None:
        (path,) = [one for one in contents if one.endswith(f".dist-info/{name}")]
        contents[path] = change(contents[path])

    return damage


DAMAGES: dict[str, tuple[Callable[[Contents], object], str]] = {
    "no style": (lambda c: c.pop(CSS), f"lacks a file of the checkout: {CSS}"),
    "stale": (lambda c: c.update({CSS: b"p {}"}), f"another version of {CSS}"),
    "test": (lambda c: c.update({"llama_runtime/test_x.py": b""}), "holds a test: llama_runtime/"),
    "tests": (lambda c: c.update({"tests/conftest.py": b""}), "holds a test: tests/conftest.py"),
    "junk": (
        lambda c: c.update({"llama_runtime/a.swp": b""}),
        "of an unknown kind: llama_runtime/",
    ),
    "licence": (in_metadata("licenses/NOTICE", lambda _: b""), "lacks NOTICE, or holds another"),
    "system": (in_metadata("WHEEL", lambda d: d.replace(b"-any", b"-x")), "some systems only"),
    "version": (
        in_metadata("METADATA", lambda d: d.replace(b"\nVersion: ", b"\nVersion: 9", 1)),
        "Version is '90",
    ),
    "extra": (
        in_metadata("METADATA", lambda d: d.replace(b"onnxruntime>=", b"onnxruntime>=9", 1)),
        "only the wheel has in [",
    ),
    "torch": (
        in_metadata("METADATA", lambda d: d.replace(b"\n\n", b"\nRequires-Dist: torch\n\n", 1)),
        "only the wheel has in [] torch",
    ),
    "command": (
        in_metadata("entry_points.txt", lambda d: d.replace(b"llama-run ", b"llama-walk ")),
        "no command llama-run",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wheel_that_lacks_something_or_holds_more_is_noticed(wheel: Contents, name: str) -> None:
    damage, said = DAMAGES[name]
    damage(wheel)
    assert [fault for fault in wheel_faults(wheel) if said in fault]


def test_what_is_packed_runs_without_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Modules that read files beside them, with the libraries of this environment."""
    for name, data in wheel_contents(built[0]).items():
        path = tmp_path / "wheel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from llama_runtime import LLM\n"
        "from llama_runtime.server import page_files\n"
        "from llama_runtime.evaluation import texts\n"
        "modules = [m for n, m in sys.modules.items() if n.startswith('llama_')]\n"
        "assert all(m.__file__.startswith(sys.argv[1]) for m in modules), modules\n"
        "print(texts.texts_sha256())"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "wheel")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    from llama_runtime.evaluation.texts import texts_sha256

    assert ended.stdout.strip() == texts_sha256()
