"""Bundles that somebody made to do harm, each from a good one by one change.

Sizes and hashes in the manifest are made right again wherever the change itself isn't about them,
so that every layer behind them is reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
Json = Any

HOSTILE: dict[str, Change] = {}
MANIFEST, WEIGHTS, GRAPH = "manifest.json", "model.safetensors", "decoder.onnx"
TOKENIZER, TEMPLATE, CONFIG = "tokenizer.json", "chat_template.jinja", "generation_config.json"
FIXTURE = "chat_fixture.json"


def hostile(name: str, *, rehash: bool = False) -> Callable[[Change], Change]:
    """Add a change to the corpus; ``rehash`` makes the manifest fit the files after it."""

    def add(change: Change) -> Change:
        def apply(root: Path) -> None:
            change(root)
            if rehash:
                make_right(root)

        HOSTILE[name] = apply
        return change

    return add


def make_right(root: Path) -> None:
    """Write the sizes and hashes of the files as they are into the manifest."""
    files = {
        path.relative_to(root).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    edit(root, lambda manifest: manifest.update(files=files))


def edit(root: Path, change: Callable[[Json], object], name: str = MANIFEST) -> None:
    content = json.loads((root / name).read_text(encoding="utf-8"))
    change(content)
    (root / name).write_text(json.dumps(content), encoding="utf-8")


def written(name: str, file: str, content: bytes) -> None:
    """A bundle one of whose files has another content."""

    @hostile(name, rehash=True)
    def change(root: Path) -> None:
        (root / file).write_bytes(content)


def in_manifest(name: str, change: Callable[[Json], object]) -> None:
    @hostile(name)
    def apply(root: Path) -> None:
        edit(root, change)


def raw_manifest(name: str, content: Callable[[bytes], bytes]) -> None:
    @hostile(name)
    def apply(root: Path) -> None:
        path = root / MANIFEST
        path.write_bytes(content(path.read_bytes()))


# --- the files -----------------------------------------------------------------------------------


@hostile("a file is missing")
def _(root: Path) -> None:
    (root / TOKENIZER).unlink()


@hostile("a file is cut")
def _(root: Path) -> None:
    os.truncate(root / WEIGHTS, 5000)


@hostile("a file is altered and as long as before")
def _(root: Path) -> None:
    with (root / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\x7f\x7f")


@hostile("an extra file")
def _(root: Path) -> None:
    (root / "run.py").write_text("print('hi')")


@hostile("an extra folder")
def _(root: Path) -> None:
    (root / "more").mkdir()


@hostile("10,001 extra files")
def _(root: Path) -> None:
    (root / "many").mkdir()
    for i in range(10_001):
        os.mknod(root / "many" / str(i))


@hostile("folders 500 deep")
def _(root: Path) -> None:
    folder = root
    for _ in range(500):
        folder = folder / "d"
    folder.mkdir(parents=True)


def linked(name: str, file: str, *, hard: bool) -> None:
    @hostile(name)
    def change(root: Path) -> None:
        outside = root.parent / f"{root.name}-outside"
        (root / file).rename(outside)
        if hard:
            (root / file).hardlink_to(outside)
        else:
            (root / file).symlink_to(outside)


linked("weights behind a symbolic link", WEIGHTS, hard=False)
linked("weights behind a hard link", WEIGHTS, hard=True)
linked("the manifest behind a symbolic link", MANIFEST, hard=False)
linked("the manifest behind a hard link", MANIFEST, hard=True)
linked("the tokenizer behind a hard link", TOKENIZER, hard=True)


@hostile("a linked folder")
def _(root: Path) -> None:
    (root / "licences").symlink_to(root.parent, target_is_directory=True)


@hostile("a link to itself")
def _(root: Path) -> None:
    (root / TEMPLATE).unlink()
    (root / TEMPLATE).symlink_to(TEMPLATE)


def special(name: str, file: str, make: Callable[[Path], object]) -> None:
    @hostile(name)
    def change(root: Path) -> None:
        (root / file).unlink(missing_ok=True)
        make(root / file)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


special("the weights are a named pipe", WEIGHTS, os.mkfifo)
special("the manifest is a named pipe", MANIFEST, os.mkfifo)
special("the tokenizer is a socket", TOKENIZER, _socket)
special("the manifest is a folder", MANIFEST, os.mkdir)
if os.geteuid() == 0:
    special(
        "the weights are a device",
        WEIGHTS,
        lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)),
    )


@hostile("a sparse file of 10^12 bytes")
def _(root: Path) -> None:
    os.truncate(root / WEIGHTS, 10**12)
    edit(root, lambda manifest: manifest["files"][WEIGHTS].update(size=10**12))


# --- the manifest --------------------------------------------------------------------------------

raw_manifest("an empty manifest", lambda _: b"")
raw_manifest("a manifest of zeros", lambda data: bytes(len(data)))
raw_manifest("a manifest cut in half", lambda data: data[: len(data) // 2])
raw_manifest("a manifest of 10^6 lists", lambda _: b"[" * 10**6)
raw_manifest("a manifest of 10^5 objects", lambda _: b'{"a":' * 10**5)
raw_manifest("a manifest of 5 MB", lambda data: data + b" " * 5_000_000)
raw_manifest("a manifest in UTF-16", lambda data: data.decode().encode("utf-16"))
raw_manifest("a key twice", lambda data: data.replace(b'"name"', b'"name": "a", "name"', 1))
raw_manifest(
    "a number of 10^5 digits", lambda d: d.replace(b'"schema": 1', b'"schema": ' + b"9" * 10**5)
)
raw_manifest(
    "a size that is not a number", lambda data: data.replace(b'"size": ', b'"size": NaN, "x": ')
)
in_manifest("a newer schema", lambda m: m.update(schema=999))
in_manifest("an unknown field", lambda m: m.update(run="rm"))
in_manifest("half a character in a name", lambda m: m.update(name="\ud800"))
in_manifest("a name that rewrites the terminal", lambda m: m.update(name="\x1b[2J\x1b[H$ "))
in_manifest("figures nested 500 deep", lambda m: m.update(verification=_nested(500)))


def _nested(levels: int) -> Json:
    value: Json = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def _renamed(name: str) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        manifest["files"][name] = manifest["files"][WEIGHTS]

    return change


for name in (
    "../evil",
    "/etc/passwd",
    "a/../../b",
    "C:evil",
    "a\\b",
    "a\0b",
    "./a",
    "a//b",
    "con.",
):
    in_manifest(f"a file named {name!r}", _renamed(name))
in_manifest("two names that differ in case", _renamed("MODEL.SafeTensors"))
in_manifest("the manifest among its files", _renamed("Manifest.json"))
in_manifest("a graph outside", lambda m: m["graphs"][0].update(file="../decoder.onnx"))
in_manifest("no graph", lambda m: m.update(graphs=[]))
in_manifest("a graph in an unknown dialect", lambda m: m["graphs"][0].update(dialect="evil"))
in_manifest("the graph is the weights", lambda m: m["graphs"][0].update(file=WEIGHTS))


def geometry(name: str, **numbers: int) -> None:
    in_manifest(name, lambda manifest: manifest["geometry"].update(numbers))


for field in (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "max_positions",
):
    geometry(f"{field} of 10^9", **{field: 10**9})
geometry("a vocabulary that the graph doesn't have", vocab_size=10**7)
geometry("a vocabulary of one more", vocab_size=513)
geometry("layers that the graph doesn't have", num_layers=1000)
geometry("fewer layers than the graph has", num_layers=1)
geometry("heads that the graph doesn't have", num_kv_heads=4)
geometry("a head dimension that the graph doesn't have", head_dim=64)

# --- generation_config.json ----------------------------------------------------------------------

written("a generation config that is no JSON", CONFIG, b"{")
written("a generation config of 10^6 lists", CONFIG, b"[" * 10**6)
written("a generation config of 5 MB", CONFIG, b"{}" + b" " * 5_000_000)
written("a generation config that is no object", CONFIG, b"[1]")
written("end tokens that are no numbers", CONFIG, b'{"eos_token_id": ["a"]}')
written("an end token of 10^30", CONFIG, b'{"eos_token_id": 1' + b"0" * 30 + b"}")
written("a temperature that is no number", CONFIG, b'{"do_sample": true, "temperature": NaN}')
written("a temperature of 10^308", CONFIG, b'{"do_sample": true, "temperature": 1e308}')
written("a negative top_k", CONFIG, b'{"do_sample": true, "top_k": -1}')

# --- tokenizer.json ------------------------------------------------------------------------------

written("a tokenizer that is no JSON", TOKENIZER, b"\0\1\2")
written("a tokenizer of 10^6 lists", TOKENIZER, b'{"model":' + b"[" * 10**6)
written("a tokenizer of 5 MB for 512 tokens", TOKENIZER, b"{" + b" " * 5_000_000 + b"}")


def in_tokenizer(name: str, change: Callable[[Json], object]) -> None:
    @hostile(name, rehash=True)
    def apply(root: Path) -> None:
        edit(root, change, TOKENIZER)


def _section(section: str, value: Json) -> Callable[[Json], None]:
    return lambda tokenizer: tokenizer.update({section: value})


def _replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _template(*pieces: Json) -> Json:
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


_TEXT: Json = {"Sequence": {"id": "A", "type_id": 0}}
_BOMB = {"type": "Sequence", "normalizers": [_replace({"String": "s"}, "s" * 100)] * 6}

in_tokenizer("a token id of 10^9", lambda t: t["model"]["vocab"].update(zzz=10**9))
in_tokenizer("a token id of 2^64", lambda t: t["model"]["vocab"].update(zzz=2**64))
in_tokenizer("a token id below 0", lambda t: t["model"]["vocab"].update(zzz=-1))
in_tokenizer("a token id that is no number", lambda t: t["model"]["vocab"].update(zzz="1"))
in_tokenizer("an added token of 10^9", lambda t: t["added_tokens"][0].update(id=10**9))
in_tokenizer("an empty added token", lambda t: t["added_tokens"][0].update(content=""))
in_tokenizer("ids beyond the model", lambda t: t["model"]["vocab"].update({"s": 600, "<": 601}))
in_tokenizer(
    "another kind of model",
    lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
)
in_tokenizer("dropout", lambda t: t["model"].update(dropout=0.5))
in_tokenizer("a merge of unknown tokens", lambda t: t["model"].update(merges=[["qq", "zz"]]))
in_tokenizer("a normalizer that makes 10^12 letters of one", _section("normalizer", _BOMB))
in_tokenizer(
    "a normalizer that replaces nothing", _section("normalizer", _replace({"String": ""}, "x"))
)
in_tokenizer(
    "a normalizer that ends the process",
    _section("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
)
in_tokenizer("normalizers 300 deep", _section("normalizer", _nested(300)))
in_tokenizer("chunks of length 0", _section("pre_tokenizer", {"type": "FixedLength", "length": 0}))
in_tokenizer(
    "a broken regular expression",
    _section(
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    ),
)
in_tokenizer("the text 10^5 times", _section("post_processor", _template(*[_TEXT] * 10**5)))
in_tokenizer(
    "the second text of one",
    _section("post_processor", _template({"Sequence": {"id": "B", "type_id": 0}})),
)
in_tokenizer(
    "a decoder that Caravan doesn't know",
    _section("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
)

# --- chat_template.jinja -------------------------------------------------------------------------


def template(name: str, source: str) -> None:
    """Without the fixture, by which the bundle would be refused before anything is rendered."""

    @hostile(f"template: {name}", rehash=True)
    def change(root: Path) -> None:
        (root / TEMPLATE).write_bytes(source.encode())
        (root / FIXTURE).unlink()


def _growing(use: str, levels: int = 26) -> str:
    """Lists that hold each other twice: as many levels as bits of what prints."""
    return (
        "{% set n = namespace(x=['aaaaaaaa'], y=['aaaaaaaa']) %}"
        f"{{% for i in range({levels}) %}}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ " + use + " }}"
    )


template("not UTF-8", "")
HOSTILE.pop("template: not UTF-8")
written("template: not UTF-8", TEMPLATE, b"\xff\xfe")
written("template: 5 MB", TEMPLATE, b"x" * 5_000_000)
template("syntax error", "{% for %}")
template("loops", "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}")
template("a text 10^9 times", "{{ 'a' * 1000000000 }}")
template("width of str.format", "{{ '{:>1000000000}'.format('x') }}")
template("precision of str.format", "{{ '{:.1000000000f}'.format(1.0) }}")
template("tojson of nested lists", _growing("n.x|tojson"))
template("indent of tojson", "{{ [[1]]|tojson(indent=1000000000) }}")
template("printing nested lists", _growing("n.x"))
template("comparing nested lists", _growing("n.x == n.y"))
template("sorting nested lists", _growing("[n.x, n.y]|sort|length"))
template("nested lists as a key", _growing("{n.x: 1}|length"))
template("telling the time by nested lists", _growing("strftime_now(n.x)"))
template("raising nested lists", _growing("raise_exception(n.x)"))
template(
    "chained iterators",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x|chain(n.x) %}"
    "{% endfor %}{{ n.x|length }}",
)
template(
    "lists 30,000 deep",
    "{% set n = namespace(x=[1]) %}{% for i in range(30000) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x|tojson }}",
)
template("10^5 signs before a number", "{{ " + "-" * 100_000 + "1 }}")
template("10^5 additions", "{{ 1" + "+1" * 100_000 + " }}")
template("10^5 brackets", "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}")
template("a macro that calls itself", "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}")
template("includes itself", "{% include 'chat_template' %}")
template("other files", "{% include '/etc/passwd' %}")
template("Python", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
template("refuses everything, over many lines", "{{ raise_exception('no\\n\\x1b[2Jno\\nno') }}")
template("more tokens than fit the model", "{{ 'a' * 5000 }}")
template("no text", "{# nothing #}")

# --- chat_fixture.json --------------------------------------------------------------------------


def fixture(name: str, change: Callable[[Json], object]) -> None:
    @hostile(f"fixture: {name}", rehash=True)
    def apply(root: Path) -> None:
        edit(root, change, FIXTURE)


def _first_case(part: str, value: Json) -> Callable[[Json], None]:
    def change(found: Json) -> None:
        found["cases"][0][part] = value

    return change


written("fixture: empty", FIXTURE, b"")
written("fixture: 10^5 lists", FIXTURE, b"[" * 10**5)
written("fixture: 5 MB", FIXTURE, b" " * 5_000_000)
written("fixture: of another template", TEMPLATE, b"{{ messages[0].content }}")
fixture("no cases", lambda found: found.pop("cases"))
fixture("10^4 cases", lambda found: found.update(cases=found["cases"] * 1000))
WRONG: list[Json] = [5, [], {"a": 1}]
for value in WRONG:
    for part in ("prompt", "name", "messages", "add_generation_prompt"):
        fixture(f"{part} {value!r}", _first_case(part, value))
fixture("a key too many", _first_case("more", 1))
fixture("another time", lambda found: found.update(now="never"))

# --- decoder.onnx --------------------------------------------------------------------------------

written("graph: empty", GRAPH, b"")
written("graph: garbage", GRAPH, bytes(range(256)) * 20)
written("graph: zeros", GRAPH, bytes(10**5))
written("graph: groups 10^5 deep", GRAPH, b"\x0b" * 10**5)
written("graph: a field of 2^31 bytes", GRAPH, b"\x3a\x80\x80\x80\x80\x08" * 100)
written("graph: 70 MB", GRAPH, bytes(70_000_000))


@hostile("graph: cut", rehash=True)
def _(root: Path) -> None:
    os.truncate(root / GRAPH, (root / GRAPH).stat().st_size // 2)


def graph(name: str, change: Callable[[Json], object]) -> None:
    """A change of the parsed model."""

    @hostile(f"graph: {name}", rehash=True)
    def apply(root: Path) -> None:
        import onnx

        model = onnx.load(root / GRAPH, load_external_data=False)
        change(model)
        (root / GRAPH).write_bytes(model.SerializeToString())


def _place(**entries: str) -> Callable[[Json], None]:
    """Another place for every weight."""

    def change(model: Json) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entries.get(entry.key, entry.value)

    return change


def _dims(*dims: int) -> Callable[[Json], None]:
    def change(model: Json) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def _large_constant(model: Json) -> None:
    """Ten bytes that become four gigabytes while the graph is loaded."""
    _after_logits(model, [("ConstantOfShape", ["shape"], "large")], {"shape": [10**9]})


def _outer_product(model: Json) -> None:
    """Two vectors whose product is computed while the graph is loaded."""
    _after_logits(
        model,
        [("Gemm", ["column", "row"], "square"), ("Gather", ["square", "zero"], "large")],
        {"column": [[1.0]] * 12_000, "row": [[1.0] * 12_000]},
    )


def _large_copy(model: Json) -> None:
    """The logits 10^5 times, as often as the graph runs."""
    _after_logits(model, [("Tile", ["logits_before", "times"], "large")], {"times": [10**5, 1]})


def _after_logits(
    model: Json, nodes: list[tuple[str, list[str], str]], constants: dict[str, Json]
) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    for name, value in constants.items():
        array = np.array(value, np.int64 if isinstance(value[0], int) else np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    last = model.graph.node[-1]
    last.output[0] = "logits_before"
    for operator, inputs, output in nodes:
        model.graph.node.append(helper.make_node(operator, inputs, [output]))
    model.graph.node.append(helper.make_node("Gather", ["large", "zero"], ["part"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "zero"))
    model.graph.node.append(helper.make_node("Add", ["logits_before", "part"], ["logits"]))


def _endless_loop(model: Json) -> None:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    before = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    after = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
    kept = helper.make_tensor_value_info("k", TensorProto.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["i"], ["k"])],
        "body",
        [number, before],
        [after, kept],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62, np.int64), "trips"))
    model.graph.node.append(helper.make_node("Loop", ["trips", ""], ["all"], body=body))


def _other_operator(model: Json) -> None:
    from onnx import helper

    model.graph.node.append(helper.make_node("PyOp", ["logits"], ["z"], domain="pyopadd"))
    model.opset_import.append(helper.make_opsetid("pyopadd", 1))


def _other_input(model: Json) -> None:
    from onnx import helper

    model.graph.input.append(helper.make_tensor_value_info("evil", 1, [10**9]))


def _without_logits(model: Json) -> None:
    del model.graph.output[0]


def _without_input(model: Json) -> None:
    del model.graph.input[2]


def _circle(model: Json) -> None:
    model.graph.node[0].input[0] = "logits"


def _heads(model: Json) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.i = 10**9


def _function(model: Json) -> None:
    model.functions.add(name="Add", domain="")


graph("a constant of 10^9 numbers", _large_constant)
graph("a product of constants", _outer_product)
graph("10^5 copies of the logits", _large_copy)
graph("a loop of 2^62 rounds", _endless_loop)
graph("an operator that runs Python", _other_operator)
graph("a function of its own", _function)
graph("an input more", _other_input)
graph("no logits", _without_logits)
graph("an input less", _without_input)
graph("a circle", _circle)
graph("10^9 heads", _heads)
graph("a weight of 10^9 rows", _dims(10**9, 64))
graph("a weight whose size overflows", _dims(2**62, 4))
graph("a weight of negative size", _dims(-1, 64))
graph("weights in /etc/passwd", _place(location="/etc/passwd"))
graph("weights in ..", _place(location="../outside"))
graph("weights in another file of the bundle", _place(location=MANIFEST))
graph("weights in a folder", _place(location="."))
graph("weights in memory", _place(location="*/_ORT_MEM_ADDR_/*"))
graph("weights in a file that is missing", _place(location="nowhere"))
graph("weights before the file", _place(offset="-4096"))
graph("weights behind the file", _place(offset=str(2**62)))
graph("weights at no number", _place(offset="evil"))
graph("weights without length", _place(length="0"))

# --- model.safetensors ---------------------------------------------------------------------------


@hostile("weights: shorter than the graph says", rehash=True)
def _(root: Path) -> None:
    os.truncate(root / WEIGHTS, 5000)


@hostile("weights: not numbers", rehash=True)
def _(root: Path) -> None:
    size = (root / WEIGHTS).stat().st_size
    (root / WEIGHTS).write_bytes(b"\xff" * size)
