"""Log and metrics of a process: to stderr and to whoever subscribes.

Records may come from any thread; one socket, owned by the loop's thread, sends them.  Topics end in a dot,
because SUB matches prefixes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import zmq
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ukai import messages

LATENCY_BUCKETS_S = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
)
FASTEST_S: Final = LATENCY_BUCKETS_S[0]
_BUCKET_NAMES = [*(str(b) for b in LATENCY_BUCKETS_S), "+Inf"]


class _Formatter(logging.Formatter):
    def __init__(self, node: str, process: str, as_json: bool) -> None:
        super().__init__()
        self.node, self.process, self.as_json = node, process, as_json

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "node": self.node,
            "process": self.process,
            "logger": record.name,
            "message": message,
        }

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        if self.as_json:
            return json.dumps(fields)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{stamp}.{int(record.msecs):03d} {self.node} {self.process} {fields['level']}: {fields['message']}"


class _Publish(logging.Handler):
    """Hands records to the loop's thread; what can't be handed over is already on stderr."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._loop, self._send = loop, send

    def emit(self, record: logging.LogRecord) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send, record)


def log_to_stderr(node: str, process: str, level: str, form: str) -> None:
    """Set up the root logger; before this nothing is logged."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(node, process, form == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class OpStats:
    """Counts, bytes, errors and latencies of one operation on one image; plain numbers, for the hot path."""

    __slots__ = ("buckets", "bytes", "count", "errors", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)

    def done(self, seconds: float, size_bytes: int = 0, failed: bool = False) -> None:
        self.count += 1
        self.bytes += size_bytes
        self.seconds += seconds
        self.buckets[0 if seconds <= FASTEST_S else bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        if failed:
            self.errors += 1


class Metrics(Collector):
    """The numbers of a process, as a Prometheus collector.

    ``op(name, image)`` gives the statistics of one operation; ``count(name)`` adds to a counter; ``gauges``
    are functions that yield (name, labels, value) when somebody asks.
    """

    def __init__(self) -> None:
        self.ops: dict[tuple[str, str], OpStats] = {}
        self.counters: dict[str, int] = {"ukai_protocol_errors_total": 0}
        self.gauges: list[Callable[[], Iterable[tuple[str, dict[str, str], float]]]] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def op(self, name: str, image: str) -> OpStats:
        key = (name, image)
        stats = self.ops.get(key)
        if stats is None:
            stats = self.ops[key] = OpStats()
        return stats

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def forget(self, image: str) -> None:
        """Drop what belongs to an image that is gone."""
        for key in [k for k in self.ops if k[1] == image]:
            del self.ops[key]

    def collect(self) -> Iterator[Metric]:
        labels = ["op", "image"]
        requests = CounterMetricFamily("ukai_requests", "Requests answered", labels=labels)
        size = CounterMetricFamily("ukai_bytes", "Bytes of block data moved", labels=labels)
        errors = CounterMetricFamily("ukai_errors", "Requests answered with an error", labels=labels)
        latency = HistogramMetricFamily("ukai_latency_seconds", "From request to answer", labels=labels)
        for key, s in list(self.ops.items()):
            requests.add_metric(key, s.count)
            size.add_metric(key, s.bytes)
            errors.add_metric(key, s.errors)
            total, steps = 0, []
            for name, n in zip(_BUCKET_NAMES, s.buckets, strict=True):
                total += n
                steps.append((name, float(total)))
            latency.add_metric(key, steps, s.seconds)
        yield from (requests, size, errors, latency)
        for name, value in list(self.counters.items()):
            yield CounterMetricFamily(name.removesuffix("_total"), name, value=value)
        families: dict[str, GaugeMetricFamily] = {}
        for source in self.gauges:
            for name, labelled, number in source():
                family = families.get(name)
                if family is None:
                    family = families[name] = GaugeMetricFamily(name, name, labels=list(labelled))
                family.add_metric(list(labelled.values()), number)
        yield from families.values()

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """All numbers as (name, labels, value)."""
        return [(s.name, dict(s.labels), s.value) for family in self.registry.collect() for s in family.samples]


class Telemetry:
    """Publishes log records as they come and the metrics every ``interval_s``.  Starts with ``start()`` on the loop."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, node: str, process: str, interval_s: float) -> None:
        self.metrics = Metrics()
        self._node, self._process, self._interval_s = node, process, interval_s
        self._format = _Formatter(node, process, True)
        self._socket = context.socket(zmq.PUB)
        self._socket.linger = 0
        self._socket.set(zmq.SNDHWM, 1000)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError:
            self._socket.close(0)
            raise
        self._handler: _Publish | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._handler = _Publish(loop, self._publish_record)
        logging.getLogger().addHandler(self._handler)
        self._timer = loop.call_later(self._interval_s, self._tick)

    def _publish_record(self, record: logging.LogRecord) -> None:
        fields = self._format.fields(record)
        self._send(f"log.{self._node}.{self._process}.{fields['level']}.", fields)

    def publish_metrics(self) -> None:
        fields = {
            "time": time.time(),
            "node": self._node,
            "process": self._process,
            "metrics": self.metrics.samples(),
        }
        self._send(f"metric.{self._node}.{self._process}.", fields)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._tick)
        self.publish_metrics()

    def _send(self, topic: str, fields: dict[str, Any]) -> None:
        if not self._socket.closed:
            self._socket.send_multipart([topic.encode(), messages.pack(fields)], zmq.DONTWAIT)

    def close(self) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close(0)
