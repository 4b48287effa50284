"""``/metrics``, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response

from llama_runtime.server.failures import unavailable
from llama_runtime.server.metrics import Histogram
from llama_runtime.server.metrics_table import OWN, ROWS, VLLM, Reading, Row, Value
from llama_runtime.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsRoute(Collector):
    """The metrics of one server. It is its own registry, so no other's are among them.

    Args:
        service: what all routes share.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, _request: Request) -> Response:
        """``/metrics``: as Prometheus' text, whatever is asked for.

        In the form of OpenMetrics ``prometheus_client`` 0.26 writes vLLM's colons as underscores.
        """
        return Response(generate_latest(self), headers={"content-type": CONTENT_TYPE})

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client``.

        Raises:
            StatusError: the model is still being loaded.
        """
        service = self._service
        llm = service.loaded
        if llm is None:  # and so neither its name nor its counters
            raise unavailable("the model is being loaded: try again later", "loading")
        reading = Reading(llm.stats(), service.tally, llm, len(service.gate.places))
        model = service.names[0]
        for row in ROWS:
            value = row.read(reading)
            if row.own:
                yield _family(OWN + row.own, row, value, model)
            if row.vllm and service.settings.metrics_compat == "vllm":
                yield _family(VLLM + row.vllm, row, value, model)


def _family(name: str, row: Row, value: Value, model: str) -> Metric:
    labels = ("model_name", *row.labels)
    if isinstance(value, Histogram):
        family = HistogramMetricFamily(name, row.meaning, labels=labels)
        bounds = map(floatToGoString, (*value.bounds, float("inf")))
        buckets = list(zip(bounds, accumulate(value.counts), strict=True))
        family.add_metric([model], buckets, value.total)
        return family
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    numbers = kind(name, row.meaning, labels=labels)
    by_label = value if isinstance(value, Mapping) else {(): value}
    for own, number in by_label.items():
        numbers.add_metric([model, *own], number)
    return numbers
