"""CUDA graphs of the steps that decode, one for each size of step."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, ItemsView
from typing import Any, Generic, TypeVar

from llama_runtime.backends.cuda_device import Device
from llama_runtime.errors import BackendError

logger = logging.getLogger(__name__)

MAX_GRAPHS = 128  # captured at a time; the least recently used one makes room

Size = TypeVar("Size", bound=Hashable)


class CapturedGraphs(Generic[Size]):
    """What has been captured, by size; what can't be captured runs without.

    Args:
        device: where they run.

    Attributes:
        num_captured: how many sizes have been captured so far.
    """

    def __init__(self, device: Device) -> None:
        self.num_captured = 0
        self._device = device
        self._graphs: OrderedDict[Size, Any] = OrderedDict()
        self._refused: set[Size] = set()

    def items(self) -> ItemsView[Size, Any]:
        """The graphs by size, the one that was used last at the end."""
        return self._graphs.items()

    def launch(self, size: Size) -> bool:
        """Queue the graph of a size; False if there is none."""
        if size not in self._graphs:
            return False
        self._graphs.move_to_end(size)
        self._device.launch(self._graphs[size])
        return True

    def refused(self, size: Size) -> bool:
        """Whether a size couldn't be captured, so that it isn't tried again."""
        return size in self._refused

    def capture(self, size: Size, queue: Callable[[], None], num_rows: int) -> None:
        """Capture what has just been queued as it is, for the next time.

        What has run has run, so a capture that fails is no failure of the step; that size goes on
        without one.

        Args:
            size: the key of ``launch``.
            queue: queues the same work again.
            num_rows: for the warning.
        """
        if size in self._refused:
            return
        if len(self._graphs) >= MAX_GRAPHS:
            self._device.synchronize()
            self._device.destroy(self._graphs.popitem(last=False)[1])
        try:
            with self._device.captured() as captured:
                queue()
        except BackendError as error:
            # As text: a handler that keeps the error would keep what its frames hold.
            reason = str(error)
            logger.warning("steps of %d rows run without a captured graph: %s", num_rows, reason)
            self._refused.add(size)
        else:
            self._graphs[size] = captured[0]
            self.num_captured += 1
