"""Which precisions there are, and which of them a target takes."""

from __future__ import annotations

from dataclasses import replace

from llama_export.errors import ExportError
from llama_export.host_weights import BLOCKS
from llama_export.precision import TARGETS, Precision
from llama_runtime.contract import PAGED, SLOTS, TENSORRT, DType

# The types of keys and values beside that of the activations: which target takes them, and their
# element type and what stands for it in the name of a precision.
KV_CACHES: dict[str, tuple[str, ...]] = {
    "same": tuple(TARGETS),
    "fp8": ("cuda",),
    "int8": ("cpu",),
}
_SUFFIXES: dict[str, tuple[DType, str]] = {
    "fp8": ("float8e4m3fn", "+fp8kv"),
    "int8": ("int8", "+int8kv"),
}

_CPU = (
    Precision("fp32", "cpu", "float32", "F32"),
    Precision("int8", "cpu", "float32", "F32", quantised="int8"),
    Precision("int4", "cpu", "float32", "F32", quantised="int4"),
)
# The shares of agreement are far below any model that was stored rightly, and far above one with
# two matrices exchanged.
_CUDA = (
    Precision(
        "fp16", "cuda", "float16", "F16", transposed=True, least_agreement=0.5, near_tie=0.02
    ),
    Precision(
        "bf16", "cuda", "bfloat16", "BF16", transposed=True, least_agreement=0.5, near_tie=0.1
    ),
    Precision("int4", "cuda", "float16", "F16", int4=True, least_agreement=0.25, near_tie=0.2),
)


def _with_caches(recipes: tuple[Precision, ...], kv_cache: str) -> dict[str, Precision]:
    """Recipes by name, each with the activations' cache and with that one."""
    cache, suffix = _SUFFIXES[kv_cache]
    small = (replace(recipe, name=recipe.name + suffix, cache=cache) for recipe in recipes)
    return {recipe.name: recipe for recipe in (*recipes, *small)}


CPU_PRECISIONS = _with_caches(_CPU, "int8")
CUDA_PRECISIONS = _with_caches(_CUDA, "fp8")
TENSORRT_PRECISIONS = {
    recipe.name: replace(recipe, target="tensorrt", transposed=False) for recipe in _CUDA
}
_BY_DIALECT = {
    SLOTS.name: CPU_PRECISIONS,
    PAGED.name: CUDA_PRECISIONS,
    TENSORRT.name: TENSORRT_PRECISIONS,
}
# The same graph in float32, which ONNX Runtime runs on a CPU: slowly, but so it can be checked.
TENSORRT_CHECK = Precision("fp32", "tensorrt", "float32", "F32")


def choose_precision(
    target: str,
    name: str | None,
    kv_cache: str = "same",
    block: int | None = None,
    *,
    calibrated: bool = True,
) -> Precision:
    """The recipe of that name, or the target's first, with that cache.

    Args:
        target: what the graph is for.
        name: what the weights are stored in.
        kv_cache: what keys and values are: ``same`` as the activations, ``fp8`` or ``int8``.
        block: columns that share a scale where the weights have 4 bits on a CPU; None is 32.
        calibrated: whether weights are rounded as a calibration text asks for.

    Raises:
        ExportError: the target doesn't take it; says which it takes.
    """
    taken = {
        each: [name for name in _BY_DIALECT[dialect.name] if "+" not in name]
        for each, dialect in TARGETS.items()
    }
    possible = "; ".join(f"{each} takes {' or '.join(names)}" for each, names in taken.items())
    if target not in TARGETS:
        raise ExportError(f"there is no target {target!r:.80}: {possible}")
    if name is not None and name not in taken[target]:
        raise ExportError(f"the target {target} doesn't take the precision {name:.80}: {possible}")
    if target not in KV_CACHES.get(kv_cache, ()):
        caches = {
            each: " or ".join(cache for cache, targets in KV_CACHES.items() if each in targets)
            for each in TARGETS
        }
        possible = "; ".join(f"{each} takes {cache}" for each, cache in caches.items())
        raise ExportError(f"the target {target} has no cache in {kv_cache!r:.80}: {possible}")
    _, suffix = _SUFFIXES.get(kv_cache, (None, ""))
    precision = precision_of(TARGETS[target].name, (name or taken[target][0]) + suffix)
    if not calibrated:
        if precision.quantised is None or precision.cache is not None:
            what = "an int8 cache takes its scales from the calibration text"
            if precision.quantised is None:
                what = f"{precision.name} for {target} has no weights that are rounded on a text"
            raise ExportError(f"{what}: leave --no-calibration out")
        precision = replace(precision, calibrated=False)
    if block is None:
        return precision
    if precision.quantised != "int4":
        raise ExportError(
            f"a block size is of --precision int4 --target cpu, not of {precision.weights} for "
            f"{target}"
        )
    if block not in BLOCKS:
        raise ExportError(f"the block size is {block}, and it may be {', '.join(map(str, BLOCKS))}")
    return replace(precision, block=block)


def precision_of(dialect: str, name: str) -> Precision:
    """The recipe that a manifest names for a graph.

    Raises:
        ExportError: there is none, as of a bundle that another version has built.
    """
    if dialect not in _BY_DIALECT:
        raise ExportError(
            f"the bundle has a graph in the dialect {dialect!r:.80}, and this version knows "
            f"{', '.join(_BY_DIALECT)}: use the version that built it"
        )
    known = _BY_DIALECT[dialect]
    if name not in known:
        raise ExportError(
            f"the bundle has a graph of precision {name!r:.80}, and in {dialect} this version "
            f"knows {', '.join(known)}: use the version that built it"
        )
    return known[name]
