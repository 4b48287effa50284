"""The command ``llama-export``: build, verify and inspect bundles."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_export.engine_cli import build_and_tell, engine
from llama_export.errors import ExportError
from llama_runtime import __version__, interrupts
from llama_runtime.command_line import FAILED, Commands, examples, print_out
from llama_runtime.errors import CaravanError

if TYPE_CHECKING:
    from llama_export.engines import Wanted

EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "gguf", "jinja2")
TARGETS = ("cpu", "cuda", "tensorrt")
PRECISIONS = ("fp32", "int8", "int4", "fp16", "bf16")
KV_CACHES = ("same", "fp8", "int8")
BLOCK_SIZES = ("32", "64", "128")
DEMO_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


class RandomSeed(click.ParamType[int]):
    """``random:SEED``, whose value is the seed."""

    name = "random:SEED"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The seed, or a usage error."""
        if isinstance(value, int):
            return value
        kind, _, seed = str(value).partition(":")
        if kind != "random" or not seed.isascii() or not seed.isdigit():
            self.fail(f"{value!r:.80} is not random:SEED, such as random:0", param, ctx)
        if len(seed) > 18:
            self.fail(f"the seed {seed:.30} has more than 18 digits", param, ctx)
        return int(seed)


class _Commands(Commands):
    """Every error of an export is a failure."""

    def status_of(self, error: CaravanError) -> int:  # noqa: ARG002
        return FAILED


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="Caravan %(version)s (llama-export)")
def main() -> None:
    """Turn a Llama checkpoint into a bundle that llama-run runs without PyTorch."""


@main.command(
    epilog=examples(
        "llama-export build ~/models/Llama-3.2-1B-Instruct --output llama-3.2-1b",
        "llama-export build ~/models/Llama-3.2-1B-Instruct --precision int8",
        "llama-export build ~/models/Llama-3.2-1B-Instruct --target cuda --precision bf16",
        "llama-export build ~/models/Llama-3.1-8B-Instruct --target cuda --kv-cache fp8",
        "llama-export build ~/models/Llama-3.2-1B-Instruct --target tensorrt --for sm86,sm89",
        "llama-export build Llama-3.1-8B --weights random:0 --target cuda --output speed",
    )
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    show_default=True,
    help="Directory to write; absent or empty.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="What the bundle runs on: any processor; an NVIDIA GPU, by ONNX Runtime; or one as a "
    "TensorRT engine.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="How weights are stored. cpu takes fp32, its default: exact; int8: a quarter of the size, "
    "the fastest for batches, close to exact; int4: a fifth, the fastest for one sequence at a "
    "time, and less exact. cuda and tensorrt take fp16, their "
    "default: half the size of fp32; bf16: as small, for weights that fp16 can't hold or were "
    "trained so; int4: a quarter of that for the layers' products, for a small GPU or few "
    "sequences at once, and less exact.",
)
@click.option(
    "--block-size",
    "block",
    type=click.Choice(BLOCK_SIZES),
    help="Of --precision int4 on a CPU: weights that share a scale. 128 is smaller and faster, 32 "
    "more exact.  [default: 32]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    default="same",
    show_default=True,
    help="How keys and values are kept: in the type of the activations, or in 8 bits. fp8, for "
    "cuda, halves the cache's memory, and costs some accuracy and up to a tenth of the speed of "
    "small batches. int8, for cpu, takes a quarter, and makes long contexts faster and prompts "
    "slower.",
)
@click.option(
    "--no-calibration",
    is_flag=True,
    help="Of --precision int8 and int4 on a CPU: round weights to the nearest, in place of "
    "learning from a text how to round them. Faster to build, and less exact.",
)
@click.option(
    "--quality/--no-quality",
    default=None,
    help="Measure how far its predictions of 20,000 tokens of text are from the model's in fp32, "
    "and refuse a bundle that is too far off. llama-run eval does it again.  [default: measure "
    "what is rounded for a CPU]",
)
@click.option(
    "--weights",
    "random_seed",
    type=RandomSeed(),
    help="Make weights up instead of reading some: MODEL is then the name of a published shape, "
    "such as Llama-3.2-1B. For measuring speed; the text is nonsense.",
)
@click.option(
    "--for",
    "targets",
    metavar="GPU[,GPU...]",
    help="GPUs to build TensorRT engines for, such as sm80,sm86,sm89,sm120, or current. With "
    "tensorrt_rtx they needn't be here.  [default: the one that is here; if none is, llama-run "
    "builds the engine when it first runs]",
)
@click.option("--max-batch", type=int, help="Of a TensorRT engine: sequences at once.")
@click.option("--max-len", type=int, help="Of a TensorRT engine: tokens of one sequence.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def build(
    model: Path | None,
    output: Path,
    *,
    target: str,
    precision: str | None,
    kv_cache: str,
    block: str | None,
    no_calibration: bool,
    quality: bool | None,
    random_seed: int | None,
    targets: str | None,
    max_batch: int | None,
    max_len: int | None,
    force: bool,
    quiet: bool,
) -> None:
    """Build a bundle from MODEL and verify it against MODEL.

    MODEL is a Hugging Face directory (config.json, safetensors, tokenizer.json) or a .gguf file.
    Without it the demo's model is taken, if scripts/fetch_model.py has fetched it.

    A bundle for cuda can be built on a host without a GPU: then its structure and what the
    precision costs are checked, and llama-export verify on a host with one runs it.
    """
    _require_export_extra()
    from llama_export.build import build_bundle
    from llama_export.output_folder import remove_unfinished
    from llama_export.precisions import choose_precision
    from llama_export.stages import Stages, stderr_stages

    try:
        size = None if block is None else int(block)
        choose_precision(target, precision, kv_cache, size, calibrated=not no_calibration)
    except ExportError as error:
        raise click.UsageError(str(error)) from error

    engines = _wanted_engines(target, targets, max_batch, max_len)

    def last_act() -> str:
        remove_unfinished()
        return "interrupted: nothing was left behind"

    with interrupts.last_act(last_act):
        manifest = build_bundle(
            _model(model, random_seed),
            output,
            target=target,
            precision=precision,
            kv_cache=kv_cache,
            block=size,
            calibrated=not no_calibration,
            quality=quality,
            random_seed=random_seed,
            force=force,
            stages=Stages() if quiet else stderr_stages(),
        )
    num_bytes = sum(file.size for file in manifest.files.values())
    precision, state = manifest.graphs[0].precision, "not run here"
    if manifest.verification and target == "cpu":
        state = "verified"
    print_out(f"{output}: {manifest.name}, {num_bytes / 1e6:,.0f} MB, {precision}, {state}\n")
    if target == "tensorrt":
        build_and_tell(output, engines, quiet=quiet)


main.add_command(engine)


@main.command(
    epilog=examples(
        "llama-export verify llama-3.2-1b --model ~/models/Llama-3.2-1B-Instruct",
    )
)
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle"))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="What it was built from; as for build, the demo's model by default.",
)
@click.option(
    "--weights", "random_seed", type=RandomSeed(), help="As for build, of a bundle built so."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(bundle: Path, model: Path | None, *, random_seed: int | None, quiet: bool) -> None:
    """Check BUNDLE's files, and its graph against the model it was built from.

    Every file is hashed, the chat template must write the prompts that it did when the bundle was
    built. In fp32 for cpu, the real runtime runs a ragged batch whose logits are compared with
    those of the decoder in PyTorch; what is rounded for cpu has its quality measured. For cuda and
    tensorrt, the structure of the graph is checked and logits of the stored weights are compared
    with those of the model's, and where there is a GPU, cuda's graph runs on it. The exit status is
    1 if anything is further off than it may be.
    """
    _require_export_extra()
    from llama_export.bundle_checks import verify_bundle
    from llama_export.stages import Stages, stderr_stages

    stages = Stages() if quiet else stderr_stages()
    result = verify_bundle(
        bundle, _model(model, random_seed), random_seed=random_seed, stages=stages
    )
    print_out(f"{result.summary()}\n")
    if not result.passed:
        raise SystemExit(1)


@main.command(
    epilog=examples(
        "llama-export inspect ~/models/Llama-3.2-1B-Instruct",
    )
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
def inspect(model: Path | None) -> None:
    """Show what MODEL is, and whether it can be built, without building it.

    For a bundle, use llama-run inspect.
    """
    _require_export_extra()
    from llama_export.inspect_model import describe_model

    for name, value in describe_model(model or _demo_model()):
        print_out(f"{name:<18}{value}\n")


def _wanted_engines(
    target: str, targets: str | None, max_batch: int | None, max_len: int | None
) -> Wanted | None:
    """The engines that are asked for, before anything is built.

    Raises:
        UsageError: they are asked for, and the bundle isn't for TensorRT.
    """
    if target != "tensorrt":
        given = {"--for": targets, "--max-batch": max_batch, "--max-len": max_len}
        for name, value in given.items():
            if value is not None:
                raise click.UsageError(
                    f"{name} is of a TensorRT engine: it needs --target tensorrt"
                )
        return None
    from llama_export.engines import wanted_engines

    return wanted_engines(targets, max_batch, max_len)


def _require_export_extra() -> None:
    missing = [name for name in EXPORT_PACKAGES if not _is_there(name)]
    if missing:
        raise click.ClickException(
            f"this needs {', '.join(missing)}: pip install 'llama-caravan[export]'"
        )
    from llama_runtime.backends.ort_library import check_installed_once

    check_installed_once()


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _model(given: Path | None, random_seed: int | None) -> Path | str:
    """What to build from: a path, the name of a shape, or the demo's model.

    Raises:
        ExportError: nothing was given, and the demo's model isn't there.
    """
    if random_seed is None:
        return given or _demo_model()
    return str(given or "")


def _demo_model() -> Path:
    """The model of the demo, where scripts/fetch_model.py puts it.

    Raises:
        ExportError: it isn't there.
    """
    path = Path(os.environ.get("LLAMA_EXPORT_MODEL") or Path("artifacts") / DEMO_MODEL)
    if not path.exists():
        raise ExportError(
            f"no MODEL was given and {path} is missing: give a Hugging Face directory or a .gguf "
            "file, or run scripts/fetch_model.py, which fetches a small one"
        )
    return path
