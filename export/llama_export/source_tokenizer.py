"""The tokenizer of a source model: what a bundle needs to turn text into ids and back.

A Hugging Face directory has it ready made. ``gguf_tokenizer`` builds the same from a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama_decoder.fields import quoted
from llama_decoder.source_files import MAX_JSON_BYTES
from llama_export.errors import ExportError
from llama_runtime.errors import one_line
from llama_runtime.tokenizer_file import MAX_FILE_BYTES, find_problem

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class SourceTokenizer:
    """A tokenizer in the form a bundle stores it.

    Attributes:
        tokenizer_json: the file ``tokenizer.json`` of the ``tokenizers`` library.
        generation_config: ``eos_token_id``, the list of every id that ends a text;
            ``bos_token_id`` where the model has one; ``do_sample``, ``temperature`` and the like
            as the model publishes them.
        chat_template: Jinja source, or None for a model without one.
        special_tokens: the texts a chat template may name: of ``bos_token``, ``eos_token``,
            ``unk_token`` and ``pad_token`` those that the model has.
    """

    tokenizer_json: bytes
    generation_config: dict[str, object]
    chat_template: str | None
    special_tokens: dict[str, str]


def read_huggingface_tokenizer(directory: Path) -> SourceTokenizer:
    """Read the tokenizer of a Hugging Face model directory; ``tokenizer.json`` byte for byte.

    Args:
        directory: holds ``tokenizer.json`` and, as far as the model has them,
            ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``,
            ``config.json`` and ``chat_template.jinja``.

    Raises:
        ExportError: there is no ``tokenizer.json``, or a file doesn't hold what it should.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{directory} has no tokenizer.json: write one there with transformers, "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer_json = _read_bytes(path, MAX_FILE_BYTES)
    tokenizer = parse_tokenizer(tokenizer_json, source=str(path))
    tokenizer_config = _read_object(directory / "tokenizer_config.json")
    special_tokens = _read_special_tokens(
        tokenizer_config, _read_object(directory / "special_tokens_map.json")
    )
    return SourceTokenizer(
        tokenizer_json,
        _read_generation_config(directory, special_tokens, tokenizer),
        _read_chat_template(directory, tokenizer_config),
        special_tokens,
    )


def parse_tokenizer(tokenizer_json: bytes, *, source: str) -> Tokenizer:
    """Build the tokenizer, to see that it can be built.

    Raises:
        ExportError: the runtime or the ``tokenizers`` library refuses it; names ``source``.
    """
    problem = find_problem(tokenizer_json)
    if problem is not None:
        raise ExportError(f"{source} is not a usable tokenizer: {problem}")
    try:
        return Tokenizer.from_buffer(tokenizer_json)
    except BaseException as error:  # the library raises nothing narrower, and panics of Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ExportError(f"{source} is not a usable tokenizer: {one_line(error)}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ExportError(f"{path} holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds {quoted(value)}; it must hold a JSON object")
    return value


def _read_bytes(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise ExportError(f"{path} has {size:,} bytes and may have {limit:,} at most")
    return path.read_bytes()


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not UTF-8: {error}") from error


def _read_special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """The text of each special token, from the first source that names it."""
    texts = {}
    for name in SPECIAL_TOKENS:
        for source in sources:
            token = source.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                texts[name] = text
                break
    return texts


def _read_generation_config(
    directory: Path, special_tokens: Mapping[str, str], tokenizer: Tokenizer
) -> dict[str, object]:
    """What the model publishes, with the end ids of every file in one list."""
    published = _read_object(directory / "generation_config.json")
    sources = {
        "generation_config.json": published,
        "config.json": _read_object(directory / "config.json"),
        "tokenizer_config.json": {
            f"{role}_token_id": tokenizer.token_to_id(special_tokens[f"{role}_token"])
            for role in ("bos", "eos")
            if f"{role}_token" in special_tokens
        },
    }
    bos_ids, end_ids = (
        [
            token_id
            for name, source in sources.items()
            for token_id in _token_ids(source, key, directory / name)
        ]
        for key in ("bos_token_id", "eos_token_id")
    )
    return {
        **published,
        **({"bos_token_id": bos_ids[0]} if bos_ids else {}),
        "eos_token_id": list(dict.fromkeys(end_ids)),
    }


def _token_ids(source: Mapping[str, Any], key: str, path: Path) -> list[int]:
    """The value of a key that is null, one id, or a list of ids."""
    value = source.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in values):
        raise ExportError(f"{key} in {path} is {quoted(value)}; it must be a token id or a list")
    return values


def _read_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the configuration, as it does in transformers."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    path = directory / "tokenizer_config.json"
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        defaults = [
            entry.get("template")
            for entry in template
            if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        if not defaults:
            raise ExportError(
                f"chat_template in {path} is a list without one named 'default': give the one to "
                "use that name"
            )
        template = defaults[0]
    if template is None or isinstance(template, str):
        return template
    raise ExportError(f"chat_template in {path} is {quoted(template)}; it must be a string")
