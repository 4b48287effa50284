"""Engines that were built on this machine, kept for its user.

An engine is code: TensorRT runs what a plan says. So one that comes from elsewhere isn't loaded,
not even with a description that fits. Each is signed with a secret that lies beside the engines
and never leaves the user's cache folder:

    engines/secret            32 random bytes
    engines/<key>/engine.plan
                  engine.json what it was built from, its hash, and the signature of both
                  build.log   what TensorRT said

This protects from engines that were copied, unpacked or shared. Who can write as the user needs no
engine to do harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import mmap
import os
import secrets
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_runtime.errors import BackendError
from llama_runtime.tensorrt.engine_build import BuiltEngine
from llama_runtime.tensorrt.library import CURRENT, Library
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt.private_files import (
    RefusedError,
    check_status,
    find_secret,
    make_private,
    new_secret,
    opened,
    write_private,
)
from llama_runtime.user_cache import cache_folder

FORMAT = 1  # to be raised when engines are built or stored another way
PLAN, DESCRIPTION, LOG = "engine.plan", "engine.json", "build.log"

_MAX_DESCRIPTION_BYTES = 2**16
_TRIES = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineKey:
    """All that an engine depends on.

    Attributes:
        graph: hash of the graph, as the manifest has it.
        weights: hash of its weights, likewise.
        library: name of the library.
        version: the library's.
        targets: GPUs that it is for.
        precision: type of activations and caches.
        max_batch: of its limits, as are the following.
        max_len: tokens of a sequence.
        capacity: of a cache.
        max_chunk: prompt tokens of a step.
        max_logits: rows of logits of a prompt's step.
        device: the GPU, if ``targets`` is the current one.
    """

    graph: str
    weights: str
    library: str
    version: str
    targets: tuple[str, ...]
    precision: str
    max_batch: int
    max_len: int
    capacity: int
    max_chunk: int
    max_logits: int
    device: str = ""

    @classmethod
    def of(
        cls,
        graph: str,
        weights: str,
        library: Library,
        targets: tuple[str, ...],
        precision: str,
        limits: EngineLimits,
        *,
        device: str = "",
    ) -> EngineKey:
        """The key of what ``build_engine`` builds.

        Args:
            graph: hash of the graph, as the manifest has it.
            weights: hash of its weights, likewise.
            library: what builds it.
            targets: of ``parse_targets``.
            precision: type of activations and caches.
            limits: sizes of the engine.
            device: name and compute capability of the GPU, which an engine for the current one
                needs: a home folder may be shared between machines.
        """
        if CURRENT in targets and not device:
            raise ValueError("an engine for the current GPU needs the GPU in its key")
        return cls(
            graph,
            weights,
            library.name,
            library.version,
            targets,
            precision,
            limits.max_batch,
            limits.max_len,
            limits.capacity,
            limits.max_chunk,
            limits.max_logits,
            device,
        )

    @property
    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "targets": list(self.targets), "format": FORMAT}

    @property
    def digest(self) -> str:
        """The name of its folder."""
        return hashlib.sha256(_canonical(self.fields)).hexdigest()


def engine_folder(key: EngineKey) -> Path | None:
    """Where an engine is kept, or would be; None where nothing can be."""
    folder = cache_folder()
    return None if folder is None else folder / "engines" / key.digest


def store(key: EngineKey, built: BuiltEngine) -> Path | None:
    """Keep an engine that was built here.

    Args:
        key: what it was built from.
        built: of ``build_engine``.

    Returns:
        Its folder; None, with a warning, if it can't be kept. It can be used all the same.
    """
    return _store(key, built.plan, built.log)


def sign_off(plan: Path, key: EngineKey) -> Path | None:
    """Keep an engine from elsewhere as if it had been built here: the user vouches for it.

    Args:
        plan: its file.
        key: what it is said to be built from, which can't be checked.

    Returns:
        As ``store`` does.

    Raises:
        BackendError: the file can't be read.
    """
    try:
        content = plan.read_bytes()
    except OSError as error:
        raise BackendError(f"{plan} can't be read: {error.strerror}") from error
    return _store(key, memoryview(content), f"taken from {plan}\n")


def load(key: EngineKey) -> memoryview | None:
    """An engine that was built here.

    Args:
        key: what it has to be built from.

    Returns:
        Its plan, mapped; None if there is none, or, with a warning, if it isn't to be trusted.
    """
    folder = engine_folder(key)
    if folder is None or not os.path.lexists(folder):
        return None
    try:
        return _verified(folder, key)
    except (RefusedError, OSError) as error:
        logger.warning("the engine in %s isn't used and will be built again: %s", folder, error)
        return None


def _store(key: EngineKey, plan: memoryview, log: str) -> Path | None:
    folder = engine_folder(key)
    if folder is None:
        logger.warning("the engine isn't kept: this user has no cache folder")
        return None
    unfinished = folder.with_name(f".{key.digest}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        make_private(folder.parent)
        secret = find_secret(folder.parent) or new_secret(folder.parent)
        unfinished.mkdir(mode=0o700)
        try:
            about = {"key": key.fields, "size": plan.nbytes, "sha256": _sha256(plan)}
            signed = json.dumps({**about, "signature": _signature(secret, about)}, indent=1)
            write_private(unfinished / PLAN, plan)
            write_private(unfinished / LOG, log.encode())
            write_private(unfinished / DESCRIPTION, signed.encode())
            _put(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # it is gone if all went well
    except (RefusedError, OSError) as error:
        logger.warning("the engine can't be kept in %s: %s", folder, error)
        return None
    return folder


def _put(unfinished: Path, folder: Path) -> None:
    """Put a folder where another may be, or may come at the same time: each is whole."""
    for _ in range(_TRIES):
        try:
            unfinished.rename(folder)
        except OSError:  # something is there
            aside = unfinished.with_name(f"{unfinished.name}.old")
            with contextlib.suppress(FileNotFoundError):  # another one has taken it away
                folder.rename(aside)
            _remove(aside)
        else:
            return
    raise RefusedError("others keep writing it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _verified(folder: Path, key: EngineKey) -> memoryview:
    for path in (folder.parent, folder):
        check_status(path.lstat(), stat.S_ISDIR, path.name)
    secret = find_secret(folder.parent)
    if secret is None:
        raise RefusedError("the secret that it was signed with is gone")
    with opened(folder / DESCRIPTION) as file:
        try:
            description = json.loads(os.read(file, _MAX_DESCRIPTION_BYTES))
            signature = description.pop("signature")
            size, sha256 = description["size"], description["sha256"]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise RefusedError(f"{DESCRIPTION} isn't a description of an engine") from None
    if not hmac.compare_digest(str(signature).encode(), _signature(secret, description).encode()):
        raise RefusedError("it wasn't signed here, so it comes from elsewhere or was altered")
    if description["key"] != key.fields:
        raise RefusedError("it is another engine")
    with opened(folder / PLAN) as file:
        if os.fstat(file).st_size != size or size == 0:
            raise RefusedError(f"{PLAN} doesn't have {size:,} bytes")
        plan = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_READ))
    if _sha256(plan) != sha256:
        raise RefusedError(f"{PLAN} was altered")
    return plan


def _signature(secret: bytes, about: dict[str, Any]) -> str:
    return hmac.new(secret, _canonical(about), hashlib.sha256).hexdigest()


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
