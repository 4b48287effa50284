"""The manifest of a bundle: what it holds, where it came from, and how to know it is unharmed.

``manifest.json`` is written by ``llama-export`` and read by ``llama-run``; both use this module.
Reading checks every field and refuses unknown ones, so the rest of the program can rely on a
`Manifest`. Writing the same manifest twice gives the same bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeVar

from llama_runtime.contract import Geometry
from llama_runtime.errors import BundleError

SCHEMA_VERSION = 1

# Far beyond any Llama, and small enough that products of two of them stay in 64 bits.
_GEOMETRY_LIMITS = Geometry(
    num_layers=1_000,
    num_heads=1_000,
    num_kv_heads=1_000,
    head_dim=1_000,
    hidden_size=1_000_000,
    intermediate_size=10_000_000,
    vocab_size=10_000_000,
    max_positions=100_000_000,
)
_MAX_FILE_BYTES = 2**50
_MAX_NESTING = 32  # of lists and objects
MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that a bundle was built from.

    Attributes:
        format: ``gguf``, ``safetensors``, or ``random`` for weights that were made up.
        file: its name, without a folder; of random weights, the model whose shape they have.
        sha256: of the file, in lower-case hexadecimal; of random weights, of a text about them.
    """

    format: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Licence:
    """The terms that the model came with.

    Attributes:
        name: as the checkpoint says it, such as ``apache-2.0``; None if it says nothing.
        files: licence and notice files in the bundle.
    """

    name: str | None
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """One compiled form of the decoder.

    Attributes:
        dialect: name of a dialect of the step contract; a bundle has one graph of each at most.
        precision: name of the recipe of its weights: ``fp32``, ``fp16``, ``bf16``, ``int8``, or
            ``int4``; of one whose keys and values have 8 bits, ``+fp8kv`` or ``+int8kv`` behind it.
        file: the ONNX file in the bundle.
    """

    dialect: str
    precision: str
    file: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file of the bundle must be: its size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a bundle says about itself.

    Attributes:
        name: the model's name.
        created_by: versions of the tools that built it, by tool.
        source: the checkpoint.
        licence: its terms.
        geometry: the model's numbers.
        graphs: the decoder graphs.
        special_tokens: text of special tokens by the name chat templates use (``bos_token``).
        verification: figures measured when the bundle was built; any JSON values.
        files: every file but the manifest, by its name relative to the bundle, with ``/``.
        schema: version of this layout.
    """

    name: str
    created_by: Mapping[str, str]
    source: Source
    licence: Licence
    geometry: Geometry
    graphs: tuple[Graph, ...]
    special_tokens: Mapping[str, str]
    verification: Mapping[str, object]
    files: Mapping[str, FileEntry]
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of ``manifest.json``, keys sorted, ending in a newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read the contents of a ``manifest.json``.

        Raises:
            BundleError: if it isn't JSON, is of another schema, or a field is missing, unknown or
                not what it should be.
        """
        root = _Object(_parse(data), "manifest.json")
        _check_schema(root.take("schema", _integer(0, 10**9)))
        manifest = cls(
            name=root.take("name", _text),
            created_by=root.take("created_by", _mapping_of(_text)),
            source=root.take("source", _source),
            licence=root.take("licence", _licence),
            geometry=root.take("geometry", _geometry),
            graphs=root.take("graphs", _list_of(_graph)),
            special_tokens=root.take("special_tokens", _mapping_of(_any_text)),
            verification=root.take("verification", _mapping_of(lambda value, _: value)),
            files=root.take("files", _files),
        )
        root.close()
        _check_references(manifest)
        return manifest


def _parse(data: bytes) -> object:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError(
            "manifest.json holds half of a surrogate pair, which is no character"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not JSON: {error}") from error
    if _deeper_than(_MAX_NESTING, value):
        raise BundleError(f"manifest.json is nested over {_MAX_NESTING} levels deep")
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of a key that comes twice, two readers may take different values."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} comes twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _deeper_than(levels: int, value: object) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(levels - 1, item) for item in items)


def _check_schema(schema: int) -> None:
    if schema > SCHEMA_VERSION:
        raise BundleError(
            f"manifest.json is of schema {schema} and this Caravan reads {SCHEMA_VERSION}: "
            "upgrade it, or rebuild the bundle with llama-export build"
        )
    if schema < SCHEMA_VERSION:
        raise BundleError(
            f"manifest.json is of schema {schema} and this Caravan reads {SCHEMA_VERSION}: "
            "rebuild the bundle with llama-export build"
        )


def _check_references(manifest: Manifest) -> None:
    """What the manifest names must be among its files."""
    named = [graph.file for graph in manifest.graphs] + list(manifest.licence.files)
    for name in [*named, "tokenizer.json", "generation_config.json"]:
        if name not in manifest.files:
            raise BundleError(f"manifest.json has no {name} among its files")
    dialects = [graph.dialect for graph in manifest.graphs]
    if not dialects or len(set(dialects)) < len(dialects):
        raise BundleError(
            "manifest.json: graphs must name one graph for each of one or more dialects, "
            f"not {dialects}"
        )


class _Object:
    """One JSON object whose keys are taken one by one until none may be left."""

    def __init__(self, value: object, where: str) -> None:
        self._left: dict[str, object] = dict(_mapping_of(lambda item, _: item)(value, where))
        self._where = where

    def take(self, key: str, read: Callable[[object, str], T]) -> T:
        if key not in self._left:
            raise BundleError(f"{self._where} has no '{key}'")
        return read(self._left.pop(key), f"{self._where}: {key}")

    def close(self) -> None:
        if self._left:
            raise BundleError(f"{self._where} has an unknown field '{min(self._left)}'")


def _any_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BundleError(f"{where} must be text, not {value!r:.80}")
    return value


def _text(value: object, where: str) -> str:
    """A text that is shown: a control character in it could change a terminal."""
    text = _any_text(value, where)
    if not text.isprintable():
        raise BundleError(f"{where} must be text that prints on one line, not {value!r:.80}")
    return text


def _integer(low: int, high: int) -> Callable[[object, str], int]:
    def read(value: object, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BundleError(f"{where} must be a whole number in {low}..{high}, not {value!r:.80}")
        return value

    return read


def _sha256(value: object, where: str) -> str:
    if not _SHA256.fullmatch(_text(value, where)):
        raise BundleError(f"{where} must be 64 lower-case hexadecimal digits, not {value!r:.80}")
    return str(value)


def _file_name(value: object, where: str) -> str:
    """A name that stays inside the bundle on every operating system."""
    name = _any_text(value, where)
    outside = any(part in ("", ".", "..") or part[-1] in ". " for part in name.split("/"))
    if outside or "\\" in name or ":" in name or not name.isprintable():
        raise BundleError(f"{where}: {name!r:.80} is not the name of a file inside the bundle")
    return name


def _list_of(read: Callable[[object, str], T]) -> Callable[[object, str], tuple[T, ...]]:
    def read_list(value: object, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise BundleError(f"{where} must be a list, not {value!r:.80}")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_list


def _mapping_of(read: Callable[[object, str], T]) -> Callable[[object, str], dict[str, T]]:
    def read_mapping(value: object, where: str) -> dict[str, T]:
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object, not {value!r:.80}")
        return {key: read(item, f"{where}: {key:.80}") for key, item in value.items()}

    return read_mapping


def _record(
    make: Callable[..., T], **readers: Callable[[object, str], Any]
) -> Callable[[object, str], T]:
    def read(value: object, where: str) -> T:
        given = _Object(value, where)
        values = {key: given.take(key, reader) for key, reader in readers.items()}
        given.close()
        return make(**values)

    return read


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _geometry(value: object, where: str) -> Geometry:
    limits = {field.name: getattr(_GEOMETRY_LIMITS, field.name) for field in fields(Geometry)}
    read = _record(Geometry, **{name: _integer(1, limit) for name, limit in limits.items()})
    geometry = read(value, where)
    if geometry.num_heads % geometry.num_kv_heads:
        raise BundleError(
            f"{where}: {geometry.num_heads} query heads can't share {geometry.num_kv_heads} "
            "key and value heads evenly"
        )
    return geometry


def _files(value: object, where: str) -> dict[str, FileEntry]:
    entries = _mapping_of(_record(FileEntry, size=_integer(0, _MAX_FILE_BYTES), sha256=_sha256))
    files = {_file_name(name, where): entry for name, entry in entries(value, where).items()}
    spellings: dict[str, str] = {}
    for name in (MANIFEST, *files):
        other = spellings.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other is not name:
            raise BundleError(
                f"{where}: {name!r:.80} and {other!r:.80} are the same file on some systems"
            )
    return files


_source = _record(Source, format=_text, file=_text, sha256=_sha256)
_licence = _record(Licence, name=_optional_text, files=_list_of(_file_name))
_graph = _record(Graph, dialect=_text, precision=_text, file=_file_name)
