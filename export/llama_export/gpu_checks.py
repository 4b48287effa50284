"""What of a bundle for a GPU can be checked on a host without one: structure and weights.

The graph itself isn't run here, and nothing here says that it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama_export.device_check import DeviceCheck
from llama_export.graph_structure import check_structure
from llama_export.precision import Precision
from llama_export.sources import ModelSource, RandomSource
from llama_export.stages import Advance
from llama_export.weights_cost import WeightsCost, measure_weights, num_read_parameters
from llama_runtime.bundle import Bundle


@dataclass(frozen=True, slots=True)
class GpuVerification:
    """A bundle for a GPU whose structure is right.

    Attributes:
        weights: what the precision costs; None for random weights, which nothing can be lost of.
        device: how far a GPU is from the decoder; None where none has run it.
    """

    weights: WeightsCost | None
    device: DeviceCheck | None = None

    @property
    def passed(self) -> bool:
        """Whether the bundle may be used."""
        found = (self.weights, self.device)
        return all(one is None or one.passed for one in found)

    def require_passed(self) -> None:
        """Raise an ``ExportError`` that says what is off, unless it passed."""
        for one in (self.weights, self.device):
            if one is not None:
                one.require_passed()

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it."""
        found = (self.weights, self.device)
        return {k: v for one in found if one is not None for k, v in one.as_dict().items()}

    def summary(self) -> str:
        """The result in one sentence."""
        figures = "random weights" if self.weights is None else self.weights.summary()
        run = "it has not been run here" if self.device is None else self.device.summary()
        return f"the graph has the structure of the contract; {figures}; {run}"


def verify_unrun(
    bundle: Bundle,
    source: ModelSource,
    precision: Precision,
    weights: Path,
    progress: Advance = lambda _: None,
) -> GpuVerification:
    """Check a bundle with a graph in the ``paged`` or ``tensorrt`` dialect, without running it.

    Args:
        bundle: its files have been checked.
        source: what it was built from.
        precision: the recipe that the manifest names.
        weights: the weight file.
        progress: called with the count so far, of ``num_unrun_steps``.

    Raises:
        ExportError: the graph is not what the contract and the weight file say.
    """
    config = source.config
    graph = bundle.graph_path(precision.dialect.name)
    check_structure(graph, weights, config.geometry, precision, precision.layout(config))
    if isinstance(source, RandomSource):
        return GpuVerification(None)
    return GpuVerification(
        measure_weights(
            config, precision, source.weights(), weights, bundle.tokenizer_path, progress
        )
    )


def num_unrun_steps(source: ModelSource) -> int:
    """What ``verify_unrun`` counts to, for progress."""
    return 0 if isinstance(source, RandomSource) else num_read_parameters(source.config)
