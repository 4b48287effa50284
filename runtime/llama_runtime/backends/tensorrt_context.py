"""A TensorRT engine and what executes it, as little of NVIDIA's library as the runner needs."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from llama_runtime.backends.cuda_device import Device
from llama_runtime.contract import DType, TensorSpec
from llama_runtime.errors import BackendError, one_line
from llama_runtime.tensorrt.kept import load_kept, store_kept
from llama_runtime.tensorrt.library import Library, Messages, messages, process_logger

_TYPES: dict[DType, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
}  # by the names of TensorRT's ``DataType``


class ExecutionContext(Protocol):
    """What the runner calls of TensorRT's ``IExecutionContext``; False is a failure."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Choose the profile, before any shape."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set the shape of an input, within the profile."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Set where an input or output lies, at a multiple of 256 bytes."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the kernels with the shapes and addresses of now."""


class Contexts(Protocol):
    """Where execution contexts come from."""

    def create(self) -> ExecutionContext:
        """A new one, without profile, shapes and addresses."""

    def close(self) -> None:
        """Let go of the engine; its contexts are gone by then."""


class TensorRtEngine:
    """A deserialised engine on a device.

    Its contexts share the memory of their intermediate results: all run on one stream, one after
    the other.

    Args:
        library: what built the plan.
        plan: the serialised engine.
        device: where it runs; the memory of contexts is the device's.

    Raises:
        BackendError: the plan is damaged, of another version of the library or of another GPU, or
            device memory is short.
    """

    def __init__(self, library: Library, plan: bytes | memoryview, device: Device) -> None:
        self._module, self._library = library.module, library
        self._about = "{}, {}.{}".format(device.name, *device.capability)
        self._runtime = self._module.Runtime(process_logger(library))
        with messages() as said:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"the TensorRT engine can't be loaded: {_reason(said)}")
        self._num_bytes = int(self._engine.device_memory_size_v2)
        self._memory = device.allocate(self._num_bytes, zero=False)
        self._config: Any = None
        self._compiled: Any = None
        self._found = b""
        if library.builds_ahead:
            self._open_compiled()

    def create(self) -> ExecutionContext:
        """See ``Contexts.create``.

        Raises:
            BackendError: TensorRT can't make one.
        """
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with messages() as said:
            context: Any = self._engine.create_execution_context(self._config or strategy)
        if context is None:
            raise BackendError(f"TensorRT makes no execution context: {_reason(said)}")
        context.set_device_memory(self._memory, self._num_bytes)
        return context  # type: ignore[no-any-return]

    def check(
        self,
        inputs: Seq[TensorSpec],
        outputs: Seq[TensorSpec],
        sizes: Mapping[str, int],
        num_profiles: int,
    ) -> None:
        """Compare what the engine takes and gives with the contract.

        Args:
            inputs: what it must take.
            outputs: what it must give.
            sizes: of the axes that have one, by letter.
            num_profiles: how many optimization profiles it must have.

        Raises:
            BackendError: it is another graph's, or was built for other limits.
        """
        engine, modes = self._engine, self._module.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        has = {
            name: (
                engine.get_tensor_mode(name) == modes.INPUT,
                engine.get_tensor_dtype(name).name,
                list(engine.get_tensor_shape(name)),
            )
            for name in names
        }
        needs = {
            spec.name: (is_input, _TYPES[spec.dtype], [sizes.get(axis, -1) for axis in spec.axes])
            for is_input, specs in ((True, inputs), (False, outputs))
            for spec in specs
        }
        for name in sorted(has.keys() | needs.keys()):
            if has.get(name) != needs.get(name):
                raise BackendError(
                    f"the TensorRT engine doesn't fit its bundle: {name!r:.80} is "
                    f"{has.get(name)} and must be {needs.get(name)}"
                )
        if engine.num_optimization_profiles != num_profiles:
            raise BackendError(
                f"the TensorRT engine has {engine.num_optimization_profiles} optimization "
                f"profiles and must have {num_profiles}"
            )

    def close(self) -> None:
        """See ``Contexts.close``; what was compiled meanwhile is kept."""
        if self._compiled is not None:
            found = bytes(self._compiled.serialize())
            if found != self._found:
                store_kept("runtime", self._library, self._about, found)
        self._config = self._compiled = self._engine = self._runtime = None

    def _open_compiled(self) -> None:
        """Let contexts share the kernels that TensorRT-RTX compiles, and those of earlier runs."""
        self._found = load_kept("runtime", self._library, self._about)
        config = self._config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        compiled = self._compiled = config.create_runtime_cache()
        with messages():  # of another driver, say, it refuses them, and compiles anew
            if self._found and not compiled.deserialize(self._found):
                self._found = b""
        config.set_runtime_cache(compiled)


class BoundContext:
    """An execution context of one profile on a device's stream, its failures raised.

    Args:
        context: a new one.
        profile: the optimization profile that it keeps.
        device: whose stream it runs on.

    Raises:
        BackendError: TensorRT refuses the profile; so do the methods, if it refuses what they ask.
    """

    def __init__(self, context: ExecutionContext, profile: int, device: Device) -> None:
        self._context: ExecutionContext = context
        self._stream = device.stream or 0
        if not context.set_optimization_profile_async(profile, self._stream):
            raise BackendError(f"TensorRT refuses optimization profile {profile}")

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input."""
        if not self._context.set_input_shape(name, shape):
            raise BackendError(f"TensorRT refuses {name} of the shape {list(shape)}")

    def bind(self, name: str, address: int) -> None:
        """Set where an input or output lies."""
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"TensorRT refuses the address of {name}")

    def run(self) -> None:
        """Queue the kernels."""
        with messages() as said:
            queued = self._context.execute_async_v3(self._stream)
        if not queued:
            raise BackendError(f"TensorRT can't run the step: {_reason(said)}")

    def close(self) -> None:
        """Let go of the context, whoever may still hold this: the frames of an error do."""
        del self._context


def _reason(said: Messages) -> str:
    """Why TensorRT has failed, which its functions don't say."""
    return one_line("; ".join(said.errors) or "it gives no reason")
