"""Engines are kept for the user who built them, and no other engine is taken for one of those."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama_runtime.errors import BackendError
from llama_runtime.tensorrt import engine_cache, private_files
from llama_runtime.tensorrt.engine_build import BuiltEngine
from llama_runtime.tensorrt.engine_cache import EngineKey, engine_folder, load, sign_off, store
from llama_runtime.tensorrt.library import Library
from llama_runtime.tensorrt.limits import EngineLimits

RTX = Library("tensorrt_rtx", "1.7.1", None)
LIMITS = EngineLimits(8, 1024)
KEY = EngineKey.of("a1" * 32, "b2" * 32, RTX, ("sm86", "sm89"), "float16", LIMITS)
PLAN = bytes(range(256)) * 1000
ENGINE = BuiltEngine(memoryview(PLAN), "info: done\n", 1.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama-caravan"


def _stored(key: EngineKey = KEY, engine: BuiltEngine = ENGINE) -> Path:
    folder = store(key, engine)
    assert folder is not None
    return folder


def _loaded(key: EngineKey = KEY) -> bytes | None:
    plan = load(key)
    return None if plan is None else bytes(plan)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _is_refused(caplog: pytest.LogCaptureFixture, says: str) -> bool:
    """Whether the engine isn't used, and the user reads why, once."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llama_runtime"):
        found = load(KEY)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, messages
    assert says in messages[0]
    assert "will be built again" in messages[0]
    return found is None


def test_what_was_stored_is_loaded(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(KEY) is None
    folder = _stored()
    assert _loaded() == PLAN
    assert folder == cache / "engines" / KEY.digest
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.log",
        "engine.json",
        "engine.plan",
    ]
    assert (folder / "build.log").read_text() == "info: done\n"
    assert not caplog.records


def test_it_is_private_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        folder = _stored()
    finally:
        os.umask(before)
    assert _mode(cache / "engines") == _mode(folder) == 0o700
    files = [cache / "engines" / "secret", *folder.iterdir()]
    assert {_mode(path) for path in files} == {0o600}
    assert {path.name for path in (cache / "engines").iterdir()} == {"secret", KEY.digest}
    assert (cache / "engines" / "secret").stat().st_size == 32


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, graph="c3" * 32),
        replace(KEY, weights="c3" * 32),
        replace(KEY, library="tensorrt"),
        replace(KEY, version="1.7.2"),
        replace(KEY, targets=("sm86",)),
        replace(KEY, precision="bfloat16"),
        replace(KEY, max_batch=9),
        replace(KEY, max_len=1023),
        replace(KEY, capacity=1025),
        replace(KEY, max_chunk=511),
        replace(KEY, max_logits=32),
        replace(KEY, device="NVIDIA L4 8.9"),
    ],
    ids=lambda key: next(name for name in key.fields if key.fields[name] != KEY.fields[name]),
)
def test_every_field_makes_another_engine(
    other: EngineKey, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _stored()
    assert other.digest != KEY.digest
    assert load(other) is None
    # Not even where its folder would be.
    beside = engine_folder(other)
    assert beside is not None
    folder.rename(beside)
    assert load(other) is None
    assert "it is another engine" in caplog.text


def test_the_format_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest
    monkeypatch.setattr(engine_cache, "FORMAT", engine_cache.FORMAT + 1)
    assert KEY.digest != before


def test_the_current_gpu_has_to_be_named() -> None:
    """A home folder may be shared between machines."""
    with pytest.raises(ValueError, match="needs the GPU in its key"):
        EngineKey.of("a", "b", RTX, ("current",), "float16", LIMITS)
    one, other = (
        EngineKey.of("a", "b", RTX, ("current",), "float16", LIMITS, device=device)
        for device in ("NVIDIA L4 8.9", "NVIDIA A100 8.0")
    )
    assert one.digest != other.digest


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _describe(folder: Path, **changes: object) -> None:
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _fitting_description(folder: Path) -> None:
    """The plan and its description are altered, with no secret to sign them."""
    _flip(folder / "engine.plan", 100)
    sha256 = hashlib.sha256((folder / "engine.plan").read_bytes()).hexdigest()
    _describe(folder, sha256=sha256)


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte": (lambda folder: _flip(folder / "engine.plan", 0), "was altered"),
    "last byte": (lambda folder: _flip(folder / "engine.plan", -1), "was altered"),
    "truncated": (
        lambda folder: os.truncate(folder / "engine.plan", len(PLAN) - 1),
        "doesn't have 256,000 bytes",
    ),
    "longer": (
        lambda folder: os.truncate(folder / "engine.plan", len(PLAN) + 1),
        "doesn't have 256,000 bytes",
    ),
    "empty": (lambda folder: os.truncate(folder / "engine.plan", 0), "doesn't have"),
    "no plan": (lambda folder: (folder / "engine.plan").unlink(), "No such file"),
    "plan is a link": (lambda folder: _link(folder / "engine.plan"), "is a link"),
    "plan is a pipe": (lambda folder: _pipe(folder / "engine.plan"), "of a wrong kind"),
    "plan for the group": (lambda folder: (folder / "engine.plan").chmod(0o620), "mode is 620"),
    "plan for all": (lambda folder: (folder / "engine.plan").chmod(0o602), "mode is 602"),
    "no description": (lambda folder: (folder / "engine.json").unlink(), "No such file"),
    "description is a link": (lambda folder: _link(folder / "engine.json"), "is a link"),
    "description for all": (lambda folder: (folder / "engine.json").chmod(0o606), "mode is 606"),
    "description is empty": (lambda folder: os.truncate(folder / "engine.json", 0), "description"),
    "description is a list": (
        lambda folder: (folder / "engine.json").write_text("[]"),
        "description",
    ),
    "description is nested": (
        lambda folder: (folder / "engine.json").write_text("[" * 60_000),
        "description",
    ),
    "no signature": (lambda folder: _describe(folder, signature=""), "wasn't signed here"),
    "signature is no text": (lambda folder: _describe(folder, signature=[1]), "wasn't signed here"),
    "signature is odd": (lambda folder: _describe(folder, signature="é"), "wasn't signed here"),
    "other size": (lambda folder: _describe(folder, size=1), "wasn't signed here"),
    "other key": (
        lambda folder: _describe(folder, key={**KEY.fields, "max_len": 7}),
        "wasn't signed here",
    ),
    "more fields": (lambda folder: _describe(folder, more=1), "wasn't signed here"),
    "all but the signature": (_fitting_description, "wasn't signed here"),
    "folder for the group": (lambda folder: folder.chmod(0o770), "mode is 770"),
    "folder is a link": (_link, "is a link"),
    "folder is a file": (
        _file,
        "of a wrong kind",
    ),
    "engines for all": (lambda folder: folder.parent.chmod(0o707), "mode is 707"),
    "no secret": (lambda folder: (folder.parent / "secret").unlink(), "is gone"),
    "secret of zeros": (
        lambda folder: (folder.parent / "secret").write_bytes(bytes(32)),
        "wasn't signed here",
    ),
    "short secret": (
        lambda folder: (folder.parent / "secret").write_bytes(bytes(31)),
        "isn't a secret",
    ),
    "long secret": (
        lambda folder: (folder.parent / "secret").write_bytes(bytes(33)),
        "isn't a secret",
    ),
    "secret for the group": (lambda folder: (folder.parent / "secret").chmod(0o640), "mode is 640"),
    "secret is a link": (lambda folder: _link(folder.parent / "secret"), "is a link"),
}


@pytest.mark.parametrize(("attack", "says"), ATTACKS.values(), ids=ATTACKS.keys())
def test_what_was_changed_is_not_used(
    attack: Callable[[Path], object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _stored()
    attack(folder)
    assert _is_refused(caplog, says)


@pytest.mark.parametrize("name", ["engine.plan", "engine.json", "secret", "engines", "folder"])
def test_what_belongs_to_another_user_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _stored()
    path = {"secret": folder.parent / name, "engines": folder.parent, "folder": folder}.get(
        name, folder / name
    )
    inode = path.stat().st_ino
    check = private_files.check_status

    def foreign(status: os.stat_result, *rest: object) -> None:
        if status.st_ino == inode:
            values = list(status)
            values[stat.ST_UID] += 1
            status = os.stat_result(values)
        check(status, *rest)  # type: ignore[arg-type]

    for module in (private_files, engine_cache):
        monkeypatch.setattr(module, "check_status", foreign)
    assert _is_refused(caplog, "belongs to another user")


def test_an_engine_of_another_machine_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither alone, nor over the own one; it doesn't help to bring a secret along."""
    folder = _stored()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    foreign = _stored(engine=BuiltEngine(memoryview(b"harm" * 100), "", 1))
    assert foreign != folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(folder)
    shutil.copytree(foreign, folder)
    assert _is_refused(caplog, "it comes from elsewhere or was altered")
    _stored()
    shutil.copyfile(foreign / "engine.plan", folder / "engine.plan")
    assert _is_refused(caplog, "doesn't have")
    _stored()  # what was refused is replaced
    assert _loaded() == PLAN


def test_the_signature_is_what_the_documentation_says() -> None:
    folder = _stored()
    about = json.loads((folder / "engine.json").read_text())
    signature = about.pop("signature")
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    secret = (folder.parent / "secret").read_bytes()
    assert hmac.new(secret, text.encode(), "sha256").hexdigest() == signature
    assert about["sha256"] == hashlib.sha256(PLAN).hexdigest()
    assert about["key"]["targets"] == ["sm86", "sm89"]


def test_a_foreign_plan_is_used_once_the_user_vouches_for_it(tmp_path: Path) -> None:
    plan = tmp_path / "theirs.plan"
    plan.write_bytes(b"theirs")
    folder = sign_off(plan, KEY)
    assert folder is not None
    assert _loaded() == b"theirs"
    assert str(plan) in (folder / "build.log").read_text()
    with pytest.raises(BackendError, match="can't be read: No such file"):
        sign_off(tmp_path / "nothing", KEY)


def test_one_secret_signs_all(cache: Path) -> None:
    _stored()
    secret = (cache / "engines" / "secret").read_bytes()
    other = replace(KEY, max_batch=1)
    _stored(other)
    assert (cache / "engines" / "secret").read_bytes() == secret
    assert _loaded() == _loaded(other) == PLAN


def test_stores_at_the_same_time_leave_one_whole_engine(cache: Path) -> None:
    """Also the first ones, which make the secret."""
    engines = [BuiltEngine(memoryview(bytes([i]) * 200_000), f"{i}\n", 1) for i in range(8)]
    start = threading.Barrier(len(engines))
    kept: list[Path | None] = []

    def work(engine: BuiltEngine) -> None:
        start.wait()
        kept.extend(store(KEY, engine) for _ in range(5))

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in kept
    plan = load(KEY)
    assert plan is not None
    assert bytes(plan) in [bytes(engine.plan) for engine in engines]
    log = (cache / "engines" / KEY.digest / "build.log").read_text()
    assert log == f"{plan[0]}\n"
    assert {path.name for path in (cache / "engines").iterdir()} == {"secret", KEY.digest}


def test_a_loaded_plan_outlives_its_replacement() -> None:
    _stored()
    plan = load(KEY)
    _stored(engine=BuiltEngine(memoryview(b"new"), "", 1))
    assert plan is not None
    assert bytes(plan) == PLAN
    assert _loaded() == b"new"


@pytest.mark.parametrize("kind", ["no folder", "a file", "a full disk", "bad secret"])
def test_without_a_cache_the_caller_goes_on(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if kind == "no folder":
        monkeypatch.setattr(engine_cache, "cache_folder", lambda: None)
    elif kind == "a file":
        cache.parent.mkdir()
        cache.write_text("")
    elif kind == "a full disk":
        _stored(replace(KEY, max_batch=1))
        monkeypatch.setattr(engine_cache, "write_private", full)
    else:
        _stored(replace(KEY, max_batch=1))
        (cache / "engines" / "secret").chmod(0o644)
    assert store(KEY, ENGINE) is None
    assert "kept" in caplog.text
    assert load(KEY) is None
    assert len(caplog.records) == 1
    if kind == "a full disk":
        assert len(list((cache / "engines").iterdir())) == 2  # nothing half done stays
