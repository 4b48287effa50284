"""What the passes for 8 and for 4 bits share: the products of the CPU's graph.

Both begin where ``passes`` ends: products are Gemm, some with the residual as a third input, and
where embedding and head are one matrix the head reads a twin of it. Where the bytes lie that the
new initializers stand for is ``host_weights``' to say.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from llama_decoder.names import EMBEDDING, HEAD
from llama_export.graph_edits import STORED_AS


@dataclass(frozen=True, slots=True)
class Product:
    """One product of the traced graph.

    Attributes:
        gemm: its node.
        parameter: whose matrix it reads.
        twin: whether it shares that matrix's bytes with the embedding.
        residual: what it adds to, or None.
    """

    gemm: ir.Node
    parameter: str
    twin: bool
    residual: ir.Value | None

    @property
    def rows(self) -> ir.Value:
        """What is multiplied, [N, K] or [R, K]."""
        value = self.gemm.inputs[0]
        assert value is not None
        return value


def products(model: ir.Model) -> Iterator[Product]:
    """Every product with a matrix of the model, in the graph's order."""
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        weight = gemm.inputs[1]
        if weight is None or weight.name is None:
            continue
        parameter = weight.meta.get(STORED_AS, weight.name)
        residual = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        yield Product(gemm, parameter, parameter != weight.name, residual)


def embeddings(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The node that looks rows of the embedding up, and the parameter's name."""
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is not None and table.name is not None and is_table(table.name):
            yield gather, table.name


def is_table(parameter: str) -> bool:
    """Whether it is an embedding or a head."""
    return parameter in (EMBEDDING, HEAD)
