"""What a bundle for the CPU is made of, by the name of its precision."""

from __future__ import annotations

from llama_runtime.bundle import Bundle
from llama_runtime.contract import SLOTS, DType
from llama_runtime.errors import BundleError

_CACHES: dict[str, DType] = {  # the type of keys and values; activations are float32 in all
    "fp32": "float32",
    "int8": "float32",
    "int4": "float32",
    "fp32+int8kv": "int8",
    "int8+int8kv": "int8",
    "int4+int8kv": "int8",
}


def slots_cache_dtype(bundle: Bundle) -> DType:
    """The type of keys and values of a bundle's graph in the ``slots`` dialect.

    Raises:
        BundleError: there is no such graph, or it is of a precision that this version doesn't know.
    """
    bundle.graph_path(SLOTS.name)  # which it may not have
    (precision,) = (g.precision for g in bundle.manifest.graphs if g.dialect == SLOTS.name)
    if precision not in _CACHES:
        raise BundleError(
            f"{bundle.path} has a graph of precision {precision!r}, and this Caravan runs "
            f"{', '.join(_CACHES)}: upgrade it, or rebuild the bundle with llama-export build"
        )
    return _CACHES[precision]
