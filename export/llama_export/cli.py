"""The command ``llama-export``: build, verify and inspect bundles."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from llama_export.errors import ExportError
from llama_runtime import __version__
from llama_runtime.errors import CaravanError

EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "gguf")
DEMO_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    from llama_export.stages import Stages, stderr_stages

    with _errors():
        manifest = build_bundle(
            model or _demo_model(),
            output,
            force=force,
            stages=Stages() if quiet else stderr_stages(),
        )
    size = sum(file.size for file in manifest.files.values())
    click.echo(f"{output}: {manifest.name}, {size / 1e6:,.0f} MB, verified")


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

    with _errors():
        stages = Stages() if quiet else stderr_stages()
        result = verify_bundle(bundle, model or _demo_model(), stages=stages)
    click.echo(
        f"{result.rows} rows of logits differ by at most {result.max_logit_difference:.2g} "
        f"(limit {result.logit_tolerance:g}); {result.greedy_agreement:.1%} of the likeliest "
        f"tokens agree, {result.near_ties} more are near ties"
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

    with _errors():
        for name, value in describe_model(model or _demo_model()):
            click.echo(f"{name:<18}{value}")


@contextmanager
def _errors() -> Iterator[None]:
    """Say what went wrong in one sentence, without a traceback."""
    try:
        yield
    except CaravanError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    except KeyboardInterrupt:
        click.echo("interrupted: nothing was left behind", err=True)
        raise SystemExit(130) from None


def _require_export_extra() -> None:
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"this needs {', '.join(missing)}: pip install 'llama-caravan[export]'"
        )


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


if __name__ == "__main__":
    main()
