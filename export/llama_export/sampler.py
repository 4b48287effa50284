"""The sampler as a graph: from rows of logits to token ids, in ``llama_runtime.contract``'s terms.

Three groups of rows go through it at once, and a group may be empty: ones drawn from the whole
vocabulary, ones drawn from filtered tokens, and ones that are scored. What each branch computes is
that of ``llama_runtime.sampling``, which is its specification.

No operator runs along the whole vocabulary but TopK and Softmax, because running sums and
reductions of such length are slow on a GPU: sums go over blocks of some hundred tokens first, and
what is added up after that is in float64.

A row's results are the same bits in any company. On the CPU, what is summed along an axis is added
up in another order where it doesn't begin at a multiple of the processor's vectors, and a
logarithm's last digits depend on whether its vector is full. So blocks are whole vectors, what they
sum to is added up one by one, and a vector is filled for a logarithm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llama_export.trace import OPSET
from llama_runtime.contract import (
    MAX_TOP_LOGPROBS,
    SAMPLER_INPUTS,
    SAMPLER_OUTPUTS,
    TensorSpec,
)

IR_VERSION = 10
VECTOR = 16  # float32 numbers that a processor adds at once, at most
BLOCK_SIZES = range(4 * VECTOR, 1025, VECTOR)  # where one divides V, no row has to be padded
# A draw stays below the last border: their product with the total must not round to the total.
BELOW_ONE = 1 - 2.0**-40
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def save_sampler(vocab_size: int, path: Path) -> None:
    """Write the sampler for rows of ``vocab_size`` logits."""
    onnx.save(build_sampler(vocab_size), path)


def build_sampler(vocab_size: int) -> onnx.ModelProto:
    """The sampler as an ONNX model.

    Args:
        vocab_size: V.
    """
    graph = _Graph(vocab_size)
    _whole(graph)
    _filtered(graph)
    _scored(graph)
    return graph.model()


class _Graph:
    """Nodes and constants as they are asked for; every call gives the name of its first output."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size(vocab_size)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        return self.several(operator, *inputs, outputs=outputs, **attributes)[0]

    def several(
        self, operator: str, *inputs: str, outputs: int = 2, **attributes: object
    ) -> list[str]:
        """The names of all outputs of a new node."""
        names = [f"{operator}_{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """The name of a constant."""
        array: np.ndarray = np.array(value, dtype)
        name = f"{array.dtype}_{array.tolist()}"
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def output(self, name: str, value: str) -> None:
        """Call a value by the name of an output of the sampler."""
        for node in self._nodes:
            for i, output in enumerate(node.output):
                if output == value:
                    node.output[i] = name
            for i, used in enumerate(node.input):
                if used == value:
                    node.input[i] = name

    def cast(self, value: str, dtype: str) -> str:
        """The same numbers in another type."""
        return self("Cast", value, to=_TYPES[dtype])

    def top(self, logits: str, count: str) -> list[str]:
        """The ``count`` likeliest tokens' logits and ids, likeliest first, equal ones by id."""
        return self.several("TopK", logits, count, axis=1, largest=1, sorted=1)

    def blocks(self, rows: str) -> str:
        """[R, V] as [R, blocks, block]; a vocabulary that isn't whole blocks is filled with 0."""
        missing = -self.vocab_size % self.block_size
        if missing:
            rows = self("Pad", rows, self.constant([0, 0, 0, missing]))
        return self("Reshape", rows, self.constant([-1, self.num_blocks, self.block_size]))

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.vocab_size // self.block_size)

    def sums(self, blocks: str) -> str:
        """[R, blocks, block] float32 -> [R, blocks] float64."""
        return self.cast(self("ReduceSum", blocks, self.constant([2]), keepdims=0), "float64")

    def total(self, values: str) -> str:
        """[R, n] -> [R, 1], the same bits whatever R is."""
        return self.last(self.running(values))

    def count(self, condition: str) -> str:
        """[R, n] bool -> [R, 1] int64: how many are true."""
        values = self.cast(condition, "int64")
        return self("ReduceSum", values, self.constant([1]), keepdims=1)

    def first(self, values: str) -> str:
        """[R, n] -> [R, 1]: the first column."""
        return self("Slice", values, *map(self.constant, ([0], [1], [1])))

    def last(self, values: str) -> str:
        """[R, n] -> [R, 1]: the last column."""
        return self("Slice", values, *map(self.constant, ([-1], [2**31], [1])))

    def log(self, values: str) -> str:
        """[R, 1] -> [R, 1]: what fills a vector and what is left over have other last digits."""
        vectors = self("Pad", values, self.constant([0, 0, 0, VECTOR - 1]))
        return self.first(self("Log", vectors))

    def running(self, values: str) -> str:
        """Running sums along the columns."""
        return self("CumSum", values, self.constant(1))

    def model(self) -> onnx.ModelProto:
        """All of it as a model, with the contract's inputs and outputs."""
        graph = helper.make_graph(
            self._nodes,
            "sampler",
            [self._value(spec) for spec in SAMPLER_INPUTS],
            [self._value(spec) for spec in SAMPLER_OUTPUTS],
            list(self._constants.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _value(self, spec: TensorSpec) -> onnx.ValueInfoProto:
        sizes = {"V": self.vocab_size, "1": 1, "T": min(MAX_TOP_LOGPROBS, self.vocab_size)}
        shape = [sizes.get(axis, axis) for axis in spec.axes]
        return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], shape)


def block_size(vocab_size: int) -> int:
    """How many tokens a block has: whole vectors, near the root of V, a divisor of it if any is."""
    best = vocab_size**0.5
    divisors = [size for size in BLOCK_SIZES if vocab_size % size == 0]
    default = VECTOR * max(1, round(best / VECTOR))
    return min(divisors, key=lambda size: abs(size - best), default=default)


def _probabilities(graph: _Graph, logits: str, best: str, inverse_temperature: str) -> str:
    """[R, V]: softmax((l - max l) / T).

    The maximum goes first: after a division by a small temperature, what is lost in rounding would
    show.
    """
    distance = graph("Mul", graph("Sub", logits, best), inverse_temperature)
    return graph("Softmax", distance, axis=1)


def _below(graph: _Graph, number: str, total: str) -> str:
    """``number`` of ``total``, sure to lie below it."""
    share = graph("Min", number, graph.constant(BELOW_ONE, np.float64))
    return graph("Mul", share, total)


def _whole(graph: _Graph) -> None:
    logits, number = "whole_logits", "whole_numbers"
    best, _ = graph.top(logits, graph.constant([1]))
    blocks = graph.blocks(_probabilities(graph, logits, best, "whole_inverse_temperatures"))
    sums = graph.sums(blocks)
    borders = graph.running(sums)
    total = graph.last(borders)
    target = _below(graph, number, total)
    block = graph.count(graph("LessOrEqual", borders, target))
    block = graph("Min", block, graph.constant(graph.num_blocks - 1))  # a NaN is above nothing
    mass = graph("GatherElements", sums, block, axis=1)
    before = graph("Sub", graph("GatherElements", borders, block, axis=1), mass)
    chosen = graph("GatherND", blocks, block, batch_dims=1)  # [R, block]
    inner = graph.running(graph.cast(chosen, "float64"))
    inner_total = graph.last(inner)
    # The block's sum in float32 and in float64 differ in the last digits: a share of one is meant.
    share = graph("Div", graph("Sub", target, before), mass)
    inner_target = _below(graph, share, inner_total)
    place = graph.count(graph("LessOrEqual", inner, inner_target))
    place = graph("Min", place, graph.constant(graph.block_size - 1))
    first = graph("Mul", block, graph.constant(graph.block_size))
    graph.output("whole_tokens", graph("Add", first, place))
    graph.output("whole_totals", total)


def _filtered(graph: _Graph) -> None:
    logits = "filtered_logits"
    values, ids = graph.top(logits, "candidates")
    best, worst = graph.first(values), graph.last(values)
    probabilities = _probabilities(graph, logits, best, "filtered_inverse_temperatures")
    total = graph.total(graph.sums(graph.blocks(probabilities)))
    weights = graph.cast(graph("GatherElements", probabilities, ids, axis=1), "float64")

    # Among the k likeliest, and as likely as the k-th.
    last_rank = graph("Sub", "candidates", graph.constant([1]))
    rank = graph("Min", graph("Sub", "top_k", graph.constant(1)), last_rank)
    kth = graph("GatherElements", values, rank, axis=1)
    in_k = graph("GreaterOrEqual", values, kth)
    off = graph("GreaterOrEqual", "top_k", graph.constant(graph.vocab_size))
    k_covered = graph("Less", worst, kth)
    kept = graph("Mul", weights, graph.cast(in_k, "float64"))
    borders = graph.running(kept)
    whole = graph("Where", off, total, graph.last(borders))

    # The shortest run of likeliest tokens that holds top_p of what is left.
    target = graph("Mul", "top_p", whole)
    no_p = graph("GreaterOrEqual", "top_p", graph.constant(1, np.float64))
    in_p = graph("Or", graph("Less", graph("Sub", borders, kept), target), no_p)
    p_covered = graph(
        "And", graph("GreaterOrEqual", graph.last(borders), target), graph("Not", no_p)
    )

    # At least min_p times as likely as the likeliest.
    least = graph("Mul", "min_p", graph.first(weights))
    in_min = graph("GreaterOrEqual", weights, least)
    min_covered = graph("Less", graph.last(weights), least)

    left = graph("Mul", kept, graph.cast(graph("And", in_p, in_min), "float64"))
    borders = graph.running(left)
    target = _below(graph, "filtered_numbers", graph.last(borders))
    place = graph.count(graph("LessOrEqual", borders, target))
    place = graph("Min", place, last_rank)
    graph.output("filtered_tokens", graph("GatherElements", ids, place, axis=1))
    graph.output(
        "filtered_covered",
        graph(
            "Or",
            graph("And", off, graph("Or", p_covered, min_covered)),
            graph("And", graph("Not", off), k_covered),
        ),
    )
    graph.output("filtered_totals", total)


def _scored(graph: _Graph) -> None:
    logits = "scored_logits"
    count = min(MAX_TOP_LOGPROBS, graph.vocab_size)
    values, ids = graph.top(logits, graph.constant([count]))
    best = graph.first(values)
    probabilities = graph("Softmax", graph("Sub", logits, best), axis=1)
    total = graph.total(graph.sums(graph.blocks(probabilities)))
    of_best = graph("GatherElements", probabilities, graph.first(ids), axis=1)
    # log of the sum of exp(l - max l), which is the total over the likeliest's share.
    normalizer = graph.log(graph("Div", total, graph.cast(of_best, "float64")))

    def logprobs(of_tokens: str) -> str:
        """Logits as log-probabilities; the maximum goes first, beside which a log may be lost."""
        distance = graph("Sub", graph.cast(of_tokens, "float64"), graph.cast(best, "float64"))
        return graph("Sub", distance, normalizer)

    chosen = graph("GatherElements", logits, "scored_tokens", axis=1)
    graph.output("scored_logprobs", logprobs(chosen))
    graph.output("top_tokens", ids)
    graph.output("top_logprobs", logprobs(values))
