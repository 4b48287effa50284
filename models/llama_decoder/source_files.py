"""What is looked at in a checkpoint's files before they are parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from llama_decoder.errors import CheckpointError

MAX_JSON_BYTES = 32 * 1024 * 1024  # an index of 100,000 tensors is a third of this
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
BARE_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # by protocol
# Protocols 0 and 1 have no mark of their own: a class, or a list, tuple or dictionary.
OLD_PICKLE = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\([dltVIFXK(]|[]}]q\0")
ZIPPED_PICKLE = b"PK\x03\x04"  # what torch.save writes
NEEDS_SAFETENSORS = (
    "pickles are never opened, because they can run code; save the model as safetensors "
    "(transformers: `model.save_pretrained(directory)`)"
)


def read_json(path: Path) -> Mapping[str, object]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: the file can't be read, is too large, or holds no JSON object.
    """
    refuse_disguise(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        parsed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return parsed


def refuse_disguise(path: Path) -> None:
    """Looks at a file's first bytes for what often lies under the name of something else.

    Raises:
        CheckpointError: it is a pickle, as torch.save writes it, or a Git LFS pointer, or it can't
            be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer; fetch the file with `git lfs pull`")
    # A safetensors file may begin so too: 8 bytes are a length, then comes a brace.
    begins_so = start.startswith(BARE_PICKLES) or OLD_PICKLE.match(start)
    is_bare = begins_so and start[8:9] != b"{"
    if is_bare or start.startswith(ZIPPED_PICKLE):
        raise CheckpointError(f"{path} holds a pickle: {NEEDS_SAFETENSORS}")
