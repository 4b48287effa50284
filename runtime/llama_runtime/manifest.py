"""The manifest of a bundle: what it holds, where it came from, and how to know it is unharmed.

``manifest.json`` is written by ``llama-export`` and read by ``llama-run``; both use this module.
Reading checks every field and refuses unknown ones, so the rest of the program can rely on a
`Manifest`. Writing the same manifest twice gives the same bytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from llama_runtime.contract import Geometry
from llama_runtime.errors import BundleError
from llama_runtime.json_values import is_deeper, refuse_constant, without_repeats
from llama_runtime.manifest_values import (
    Object,
    any_text,
    file_name,
    integer,
    list_of,
    mapping_of,
    optional_text,
    record,
    sha256,
    text,
)

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
        root = Object(_parse(data), "manifest.json")
        _check_schema(root.take("schema", integer(0, 10**9)))
        manifest = cls(
            name=root.take("name", text),
            created_by=root.take("created_by", mapping_of(text)),
            source=root.take("source", _source),
            licence=root.take("licence", _licence),
            geometry=root.take("geometry", _geometry),
            graphs=root.take("graphs", list_of(_graph)),
            special_tokens=root.take("special_tokens", mapping_of(any_text)),
            verification=root.take("verification", mapping_of(lambda value, _: value)),
            files=root.take("files", _files),
        )
        root.close()
        _check_references(manifest)
        return manifest


def _parse(data: bytes) -> object:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=without_repeats,
            parse_constant=refuse_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError(
            "manifest.json holds half of a surrogate pair, which is no character"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not JSON: {error}") from error
    if is_deeper(value, _MAX_NESTING):
        raise BundleError(f"manifest.json is nested over {_MAX_NESTING} levels deep")
    return value


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


def _geometry(value: object, where: str) -> Geometry:
    limits = {field.name: getattr(_GEOMETRY_LIMITS, field.name) for field in fields(Geometry)}
    read = record(Geometry, **{name: integer(1, limit) for name, limit in limits.items()})
    geometry = read(value, where)
    if geometry.num_heads % geometry.num_kv_heads:
        raise BundleError(
            f"{where}: {geometry.num_heads} query heads can't share {geometry.num_kv_heads} "
            "key and value heads evenly"
        )
    return geometry


def _files(value: object, where: str) -> dict[str, FileEntry]:
    entries = mapping_of(record(FileEntry, size=integer(0, _MAX_FILE_BYTES), sha256=sha256))
    files = {file_name(name, where): entry for name, entry in entries(value, where).items()}
    spellings: dict[str, str] = {}
    for name in (MANIFEST, *files):
        other = spellings.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other is not name:
            raise BundleError(
                f"{where}: {name!r:.80} and {other!r:.80} are the same file on some systems"
            )
    return files


_source = record(Source, format=text, file=text, sha256=sha256)
_licence = record(Licence, name=optional_text, files=list_of(file_name))
_graph = record(Graph, dialect=text, precision=text, file=file_name)
