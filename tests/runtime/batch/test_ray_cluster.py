"""The way to a Ray cluster: its version, its address and its room; no cluster runs here."""

from __future__ import annotations

import contextlib
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.runners import ray_cluster
from llama_runtime.batch.runners.ray_cluster import check_address, check_room, threads_each
from llama_runtime.errors import BackendError, CapacityError, DependencyError, RequestError


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 9))
def test_threads_each_is_the_most_that_fits(cpus: list[int], num_workers: int) -> None:
    if sum(cpus) < num_workers:
        with pytest.raises(CapacityError, match="need a processor each"):
            threads_each(cpus, num_workers)
        return
    threads = threads_each(cpus, num_workers)
    check_room(cpus, threads, num_workers, "processors")
    with pytest.raises(CapacityError):
        check_room(cpus, threads + 1, num_workers, "processors")


@pytest.mark.parametrize("address", ["", "host", "host:", ":6379", "ray://host:10001", "h:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="give HOST:PORT"):
        check_address(address)


def test_an_address_without_a_cluster_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(BackendError, match=rf"no Ray cluster answers at {address} \("):
            check_address(address)


@pytest.mark.parametrize("answer", [b"", b"220 smtp.example ESMTP\r\n"])
def test_another_server_is_no_cluster(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(answer)
                while connection.recv(100):
                    pass

        served = pool.submit(serve)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(BackendError, match="no Ray cluster answers"):
            check_address(address)
        served.result()


@pytest.mark.parametrize("version", ["2.53.0", "2.9.1", "1.13.0", "2.53.0rc1"])
def test_an_old_ray_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__=version, data=None))
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    with pytest.raises(DependencyError, match=rf"Ray {version} .*CVE-2026-27482.*2\.54.*\[scale\]"):
        ray_cluster.import_ray()


@pytest.mark.parametrize("version", ["2.54.0", "2.60.0", "3.0.0.dev0"])
def test_a_ray_without_the_hole_is_taken(version: str) -> None:
    ray_cluster.check_version(version)


def test_a_missing_ray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'llama-caravan\[scale\]'"):
        ray_cluster.import_ray()


def test_another_ray_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.40.0")

    fake = SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: fake)
    with (
        pytest.raises(DependencyError, match=r"another Ray or Python .* Ray: 2\.40\.0"),
        ray_cluster.connected("auto"),
    ):
        pass
