"""Look at an ONNX file before ONNX Runtime does.

A graph is a program, and ONNX Runtime runs parts of it while it loads. Here it is read without
being run, so that one made to harm is refused: it may use the operators that the exporter emits and
no others, has no loops, functions or computations on constants, and its weights lie in regular
files beside it, each where the graph says and as long as its shape. A graph within these rules can
still ask for much memory when it runs; it can't run for ever, nor read another file.

Standard library only. The format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path

from llama_runtime.errors import BackendError
from llama_runtime.protocol_buffers import MessageError, read_fields, read_number

MAX_GRAPH_BYTES = 2**26  # that of 30 layers has less than 2^20
MAX_DIMENSIONS = 8

# What the exporter emits, by domain. None makes a constant of what isn't one, as Shape would:
# ONNX Runtime computes with constants while it loads.
_DECODER = {
    *("Add", "Gather", "Gemm", "MatMul", "Mul", "RMSNormalization", "Reshape", "Sigmoid"),
    "SimplifiedLayerNormalization",
}
# What 8-bit products add to it.
_ROWS = {"Abs", "Cast", "Gather", "QuantizeLinear", "ReduceMax", "Sub"}
_SAMPLER = {
    *("TopK", "Softmax", "CumSum", "ReduceSum", "GatherElements", "GatherND", "Slice", "Pad"),
    *("Add", "Sub", "Mul", "Div", "Log", "Min", "Cast", "Reshape", "Where"),
    *("Less", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not"),
}
# What TensorRT gets, which reads graphs of its own dialect and no others.
_TENSORRT = {
    *("Add", "Attention", "Concat", "Gather", "Gemm", "LessOrEqual", "Mul", "RMSNormalization"),
    *("Range", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Split", "Squeeze"),
    *("TensorScatter", "Transpose", "Unsqueeze"),
}
_WIDENING = "DequantizeLinear"  # of 4-bit weights: at most eight times the bytes that are there
_TURNING = "Transpose"  # of 8-bit weights: as many bytes again
# What may work on weights alone, and who may read what comes of it: products, in the place of their
# matrix. So nothing is computed from it before there are activations.
_READERS = {_WIDENING: "Gemm", _TURNING: "MatMulIntegerToFloat"}
TENSORRT_OPERATORS = {"": frozenset(_TENSORRT | {_WIDENING})}
OPERATORS = {
    "": frozenset(_DECODER | _ROWS | _SAMPLER | {_TURNING}),
    "com.microsoft": frozenset(
        {
            "GatedAdd",
            "GatherBlockQuantized",
            "GroupQueryAttention",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "PagedAttention",
            "SkipSimplifiedLayerNormalization",
        }
    ),
}

# Bits of one element, by the number of the type in onnx.proto.
_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}


def check_graph(path: Path, operators: Mapping[str, Collection[str]] = OPERATORS) -> None:
    """Refuse a graph that could do something else than one forward pass over its own weights.

    Args:
        path: an ONNX file; its weights are looked for in its folder.
        operators: which it may use, by domain.

    Raises:
        BackendError: the file isn't an ONNX graph, or breaks a rule of this module.
    """
    try:
        _check_model(memoryview(_contents(path)), _Graph(path.parent, operators))
    except _RefusedError as error:
        raise BackendError(
            f"{path} can't be loaded: {error}; rebuild it with llama-export build"
        ) from error
    except OSError as error:
        raise BackendError(f"{path} can't be loaded: {error.strerror}") from error


class _RefusedError(Exception):
    """Why a graph is refused."""


def _contents(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise _RefusedError(f"it has {size:,} bytes and a graph has {MAX_GRAPH_BYTES:,} at most")
    return path.read_bytes()


def _check_model(model: memoryview, graph: _Graph) -> None:
    for number, value in _fields(model):
        if number == 7:
            graph.read(_message(value))
        elif number in (20, 25):
            raise _RefusedError("it has functions or training steps of its own")
    graph.close()


class _Graph:
    """The rules of a graph, checked while it is read; a format that repeats it goes on with it."""

    def __init__(self, folder: Path, operators: Mapping[str, Collection[str]]) -> None:
        self._folder = folder
        self._operators = operators
        self._constants: set[str] = set()
        self._nodes: list[tuple[str, list[str], list[str]]] = []

    def read(self, graph: memoryview) -> None:
        for number, value in _fields(graph):
            if number == 1:
                self._read_node(_message(value))
            elif number == 5:
                self._read_initializer(_message(value))
            elif number == 15:
                raise _RefusedError("it has sparse weights")

    def close(self) -> None:
        """Check what needs the whole graph."""
        if not self._nodes:
            raise _RefusedError("it is not an ONNX graph")
        made: dict[str, str] = {}  # from weights alone, and the operator that may read it
        for operator, inputs, outputs in self._nodes:
            if operator in _READERS and self._constants.issuperset(inputs):
                made |= dict.fromkeys(outputs, _READERS[operator])
        for operator, inputs, outputs in self._nodes:
            if made.keys() >= set(outputs):
                continue
            if (self._constants | made.keys()).issuperset(inputs):
                raise _RefusedError(f"one of its operators {operator} works on constants alone")
            if any(made.get(name, operator) != operator for name in inputs):
                raise _RefusedError(f"one of its operators {operator} works on changed weights")

    def _read_node(self, node: memoryview) -> None:
        inputs, outputs, operator, domain = [], [], "", ""
        for number, value in _fields(node):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number == 4:
                operator = _text(value)
            elif number == 5:
                _check_attribute(_message(value))
            elif number == 7:
                domain = _text(value)
        if operator not in self._operators.get(domain, ()):
            raise _RefusedError(f"it uses the operator {f'{domain}.{operator}'.lstrip('.')!r:.80}")
        self._nodes.append((operator, [name for name in inputs if name], outputs))

    def _read_initializer(self, tensor: memoryview) -> None:
        weights = _Weights(tensor)
        if weights.kind not in _BITS:
            raise _RefusedError(f"{weights} are of the unknown type {weights.kind}")
        if len(weights.dims) > MAX_DIMENSIONS or min(weights.dims, default=1) < 1:
            raise _RefusedError(f"{weights} have the shape {weights.dims!r:.80}")
        num_bytes = -(-prod(weights.dims) * _BITS[weights.kind] // 8)
        if weights.place:
            self._check_place(weights, num_bytes)
        elif num_bytes > 8 * weights.stored:  # a number of a packed list takes a byte at least
            raise _RefusedError(f"{weights} of the shape {weights.dims!r:.80} are not in the file")
        self._constants.add(weights.name)

    def _check_place(self, weights: _Weights, num_bytes: int) -> None:
        location = weights.place.get("location", "")
        if location in ("", ".", "..") or set(location) & set("/\\:\0*"):
            raise _RefusedError(f"{weights} lie in {location!r:.80}, not beside it")
        try:
            offset = int(weights.place.get("offset", "0"))
            length = int(weights.place.get("length", str(num_bytes)))
        except ValueError:
            raise _RefusedError(f"the place of {weights} is not a number") from None
        try:
            status = (self._folder / location).lstat()
        except OSError as error:
            problem = f"{weights} lie in {location!r:.80}: {error.strerror}"
            raise _RefusedError(problem) from error
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _RefusedError(f"{weights} lie in {location!r:.80}, a link or no regular file")
        if length != num_bytes or offset < 0 or offset + length > status.st_size:
            raise _RefusedError(
                f"{weights} need {num_bytes:,} bytes and are said to have {length:,} at "
                f"{offset:,} of {location!r:.80}, which has {status.st_size:,}"
            )


class _Weights:
    """What a TensorProto says about itself."""

    def __init__(self, tensor: memoryview) -> None:
        self.dims: list[int] = []
        self.kind, self.name, self.stored = 0, "", 0
        self.place: dict[str, str] = {}
        for number, value in _fields(tensor):
            if number == 1:
                self.dims += _integers(value)
            elif number == 2:
                self.kind = _integer(value)
            elif number == 8:
                self.name = _text(value)
            elif number == 13:
                key, text = _entry(_message(value))
                self.place[key] = text
            elif isinstance(value, memoryview):  # the values themselves, and documentation
                self.stored += len(value)

    def __str__(self) -> str:
        return f"the weights {self.name!r:.80}"


def _check_attribute(attribute: memoryview) -> None:
    """Numbers and texts are harmless; graphs are loops and branches, tensors are constants."""
    for number, _ in _fields(attribute):
        if number in (5, 6, 10, 11, 14, 15, 22, 23):
            raise _RefusedError("one of its operators has a graph or a tensor of its own")


def _entry(message: memoryview) -> tuple[str, str]:
    """A key and its text."""
    parts = {1: "", 2: ""}
    for number, value in _fields(message):
        if number in parts:
            parts[number] = _text(value)
    return parts[1], parts[2]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: their numbers, and integers or bytes."""
    try:
        for field in read_fields(message):
            yield field.number, field.value
    except MessageError as error:
        raise _RefusedError(f"it is not an ONNX graph: {error}") from error


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _RefusedError("it is not an ONNX graph")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", errors="replace")


def _integer(value: int | memoryview) -> int:
    """A signed number; the format writes negative ones as their 64-bit complement."""
    if not isinstance(value, int):
        raise _RefusedError("it is not an ONNX graph")
    return value - 2**64 if value >= 2**63 else value


def _integers(value: int | memoryview) -> list[int]:
    """One number, or a packed list of them."""
    if isinstance(value, int):
        return [_integer(value)]
    numbers, position = [], 0
    while position < len(value):
        number, position = read_number(value, position)
        numbers.append(_integer(number))
        if len(numbers) > MAX_DIMENSIONS:
            break
    return numbers
