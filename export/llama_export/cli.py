"""The command ``llama-export``: build, verify and inspect bundles."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import click

from llama_export.errors import ExportError
from llama_runtime import __version__, interrupts
from llama_runtime.command_line import FAILED, Commands, print_out
from llama_runtime.errors import CaravanError

EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "gguf")
DEMO_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


class _Commands(Commands):
    """Every error of an export is a failure."""

    def status_of(self, error: CaravanError) -> int:  # noqa: ARG002
        return FAILED


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="Caravan %(version)s (llama-export)")
def main() -> None:
    """Turn a Llama checkpoint into a bundle that llama-run runs without PyTorch."""


@main.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    show_default=True,
    help="Directory to write; absent or empty.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def build(model: Path | None, output: Path, *, force: bool, quiet: bool) -> None:
    r"""Build a bundle from MODEL and verify it against MODEL.

    MODEL is a Hugging Face directory (config.json, safetensors, tokenizer.json) or a .gguf file.
    Without it the demo's model is taken, if scripts/fetch_model.py has fetched it.

    \b
    Example:
      llama-export build ~/models/Llama-3.2-1B-Instruct --output llama-3.2-1b
    """
    _require_export_extra()
    from llama_export.build import build_bundle
    from llama_export.output_folder import remove_unfinished
    from llama_export.stages import Stages, stderr_stages

    def last_act() -> str:
        remove_unfinished()
        return "interrupted: nothing was left behind"

    with interrupts.last_act(last_act):
        manifest = build_bundle(
            model or _demo_model(),
            output,
            force=force,
            stages=Stages() if quiet else stderr_stages(),
        )
    size = sum(file.size for file in manifest.files.values())
    print_out(f"{output}: {manifest.name}, {size / 1e6:,.0f} MB, verified\n")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle"))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="What it was built from; as for build, the demo's model by default.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(bundle: Path, model: Path | None, *, quiet: bool) -> None:
    r"""Check BUNDLE's files, and its graph against the model it was built from.

    Every file is hashed, and the real runtime runs a ragged batch whose logits are compared with
    those of the decoder in PyTorch. The exit status is 1 if they differ.

    \b
    Example:
      llama-export verify llama-3.2-1b --model ~/models/Llama-3.2-1B-Instruct
    """
    _require_export_extra()
    from llama_export.build import verify_bundle
    from llama_export.stages import Stages, stderr_stages

    stages = Stages() if quiet else stderr_stages()
    result = verify_bundle(bundle, model or _demo_model(), stages=stages)
    print_out(
        f"{result.rows} rows of logits differ by at most {result.max_logit_difference:.2g} "
        f"(limit {result.logit_tolerance:g}); {result.greedy_agreement:.1%} of the likeliest "
        f"tokens agree, {result.near_ties} more are near ties\n"
    )
    if not result.passed:
        raise SystemExit(1)


@main.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
def inspect(model: Path | None) -> None:
    r"""Show what MODEL is, and whether it can be built, without building it.

    For a bundle, use llama-run inspect.

    \b
    Example:
      llama-export inspect ~/models/Llama-3.2-1B-Instruct
    """
    _require_export_extra()
    from llama_export.inspect_model import describe_model

    for name, value in describe_model(model or _demo_model()):
        print_out(f"{name:<18}{value}\n")


def _require_export_extra() -> None:
    missing = [name for name in EXPORT_PACKAGES if not _is_there(name)]
    if missing:
        raise click.ClickException(
            f"this needs {', '.join(missing)}: pip install 'llama-caravan[export]'"
        )
    from llama_runtime.backends.ort_cpu import check_installed_once

    check_installed_once()


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


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
