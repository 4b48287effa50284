"""Rows that run on the nodes of a Ray cluster, a model in each of several workers.

Ray hands out pieces of the rows, starts workers again that have died, and runs their pieces again
on others. It promises that a piece runs once at least, not only once. That each row has one result
is seen to here, and by the ledger.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_runtime import __version__
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.results.done_rows import DoneRows
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.ray_cluster import check_room, connected, room, threads_each
from llama_runtime.batch.runners.ray_tables import Piece, Shards, outcomes_of
from llama_runtime.batch.runners.ray_worker import CALLS_AT_ONCE, BatchRunner, manifest_hash
from llama_runtime.batch.runners.runner import Finish, HasRoom
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.bundle import open_bundle
from llama_runtime.cuda_loading import CUDA_AUTO_MAX_BATCH, CUDA_MAX_BATCH
from llama_runtime.errors import BackendError, CaravanError, RequestError, one_line
from llama_runtime.loading import runs_on_gpu
from llama_runtime.settings import AUTO_MAX_BATCH, DEFAULT_MAX_BATCH
from llama_runtime.shared_engine import Stats

if TYPE_CHECKING:
    import pyarrow


class RayRunner:
    """Runs rows on a Ray cluster; see ``RowRunner``.

    ``has_room`` isn't asked. In an ordered job outcomes come in the order of the rows, so that none
    waits for its turn; in an unordered one there is always room.

    Args:
        spec: what each worker loads. The bundle must be at the same path on all nodes. ``threads``
            are those of one worker; None shares out the processors of the nodes. On CUDA a worker
            has a device, which Ray chooses.
        address: ``HOST:PORT`` of the cluster's head node; ``auto`` for the cluster that this
            machine is part of; ``local`` for this machine alone.
        num_workers: how many models are loaded.
        shards: a folder of the job for the rows that aren't done. It must be on storage that all
            nodes see at the same path, such as NFS. It is removed before a run and after it.
        ordered: whether outcomes come in the order of the rows.
        quiet: whether what Ray says goes to its own log files only.

    Raises:
        DependencyError: Ray is missing or too old, here or there.
        RequestError: the address is none, or ``spec`` names devices.
        CapacityError: the cluster has too little room for the workers.
        BackendError: no cluster answers.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        address: str,
        num_workers: int,
        shards: Path,
        ordered: bool = True,
        quiet: bool = True,
    ) -> None:
        if spec.devices is not None and spec.devices != [0]:
            raise RequestError(
                f"--devices {spec.devices} can't be given with --ray: Ray gives each worker one",
                param="devices",
            )
        bundle = open_bundle(Path(spec.bundle))
        self._on_gpu = runs_on_gpu(bundle)
        self._num_workers = num_workers
        self._shards = shards
        self._ordered = ordered
        self._prompt_tokens = self._completion_tokens = self._num_left = 0
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(address, quiet=quiet))
            self._spec = self._placed(spec)
            self._stack = stack.pop_all()

    @property
    def num_slots(self) -> int:
        """Sequences that may run at once, in all workers; with "auto" the most that may."""
        return self._num_workers * self._slots

    @property
    def about(self) -> Mapping[str, object]:
        """What a worker has to work with."""
        return {
            "workers": self._num_workers,
            "max_batch": self._slots,
            "max_len": self._spec.max_len,
            "threads": self._spec.threads,
        }

    def stats(self) -> Stats:
        """How much was done; tokens count when their piece has ended.

        How many sequences run isn't known here: it is said as many as may, or as rows are left.
        """
        return Stats(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            running=min(self._num_left, self.num_slots),
        )

    def run(self, records: Iterator[Record], has_room: HasRoom, finish: Finish) -> None:  # noqa: ARG002
        """See ``RowRunner.run``."""
        shards = Shards(self._shards, self._slots)
        try:
            shards.write(records)
            if len(shards.indices):
                self._run(shards, finish)
        finally:
            self._num_left = 0
            shards.remove()

    def close(self) -> None:
        """Leave the cluster, whose workers end."""
        self._stack.close()

    def _run(self, shards: Shards, finish: Finish) -> None:
        done = DoneRows()
        self._num_left = len(shards.indices)
        with closing(self._outcomes(shards.pieces(self._num_workers))) as outcomes:
            for outcome in outcomes:
                if outcome.index in done:  # its piece has run twice
                    continue
                if outcome.index not in shards.indices:
                    raise BackendError(
                        f"Ray answered for row {outcome.index}, which wasn't asked for"
                    )
                done.add(outcome.index)
                self._num_left -= 1
                self._prompt_tokens += outcome.prompt_tokens
                self._completion_tokens += outcome.completion_tokens
                finish(outcome)
        if self._num_left:
            raise BackendError(
                f"Ray has ended and left out {self._num_left:,} of {len(shards.indices):,} rows: "
                "run the same command again, which runs them"
            )

    def _outcomes(self, pieces: Iterable[Piece]) -> Generator[Outcome, None, None]:
        tables = iter(self._dataset(pieces).iter_batches(batch_size=None, batch_format="pyarrow"))
        try:
            while (table := self._next(tables)) is not None:
                yield from outcomes_of(table)
        finally:  # it ends the workers, which nothing can when Ray is gone
            if isinstance(tables, Generator):
                tables.close()

    def _next(self, tables: Iterator[pyarrow.Table]) -> pyarrow.Table | None:
        try:
            return next(tables, None)
        except CaravanError:
            raise
        except Exception as error:  # whatever Ray's layers raise
            raise BackendError(_explained(error)) from error

    def _dataset(self, pieces: Iterable[Piece]) -> Any:
        """The results, which are computed as they are read: a call of a worker for each piece.

        Workers read the files themselves. Tasks of Ray that read would want processors of their
        own, and where the workers have them all, the job would wait for ever.
        """
        data = self._ray.data
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = self._ordered
        context.execution_no_progress_timeout_s = -1  # a piece may take long
        spec = self._spec.to_json(), __version__, manifest_hash(Path(self._spec.bundle))
        compute, options = _pool(data.ActorPoolStrategy, self._num_workers)
        options |= {"num_gpus": 1} if self._on_gpu else {"num_cpus": self._spec.threads}
        items = [asdict(piece) for piece in pieces]
        return data.from_items(items, override_num_blocks=len(items)).map_batches(
            BatchRunner,
            fn_constructor_args=spec,
            batch_size=None,
            batch_format="pyarrow",
            compute=compute,
            **options,
        )

    @property
    def _slots(self) -> int:
        """Of one worker."""
        if self._spec.max_batch is None:
            return CUDA_MAX_BATCH if self._on_gpu else DEFAULT_MAX_BATCH
        if self._spec.max_batch == "auto":
            return CUDA_AUTO_MAX_BATCH if self._on_gpu else AUTO_MAX_BATCH
        return self._spec.max_batch

    def _placed(self, spec: WorkerSpec) -> WorkerSpec:
        """What a worker loads, given what the nodes have."""
        if self._on_gpu:
            check_room(room(self._ray, "GPU"), 1, self._num_workers, "devices")
            return replace(spec, devices=None)
        cpus = room(self._ray, "CPU")
        threads = spec.threads or threads_each(cpus, self._num_workers)
        check_room(cpus, threads, self._num_workers, "processors")
        return replace(spec, threads=threads, devices=None)


def _pool(strategy: Any, num_workers: int) -> tuple[Any, dict[str, Any]]:
    """Workers that are started again when they die, as often as they do; so are their pieces.

    Args:
        strategy: Ray Data's ``ActorPoolStrategy``, whose arguments have changed.
        num_workers: how many.

    Returns:
        The strategy, and options that go beside it.
    """
    pool: dict[str, Any] = {
        "size": num_workers,
        "max_tasks_in_flight_per_actor": CALLS_AT_ONCE,
        "enable_true_multi_threading": True,
    }
    if "max_concurrent_calls_per_actor" in inspect.signature(strategy).parameters:
        # Ray's default for such pools is to restart without end; saying so is deprecated.
        return strategy(**pool, max_concurrent_calls_per_actor=CALLS_AT_ONCE), {}
    options = {"max_concurrency": CALLS_AT_ONCE, "max_restarts": -1, "max_task_retries": -1}
    return strategy(**pool), options


def _explained(error: BaseException) -> str:
    """What Ray raised, as a sentence."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    said = [line for line in str(cause).splitlines() if line.strip()]
    return f"Ray could not go on: {type(cause).__name__}: {one_line(said[-1] if said else '')}"
