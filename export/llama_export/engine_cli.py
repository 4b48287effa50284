"""The command ``llama-export engine``, and what ``llama-export build`` does of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_runtime import interrupts
from llama_runtime.command_line import examples, print_out

if TYPE_CHECKING:
    from llama_export.engines import Wanted


@click.command(
    epilog=examples(
        "llama-export engine llama-3.2-1b --for sm86,sm89 --max-batch 64",
        "llama-export engine llama-3.2-1b --for sm89 --trust engine.plan",
    )
)
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle"))
@click.option(
    "--for",
    "targets",
    metavar="GPU[,GPU...]",
    help="GPUs to build for, such as sm80,sm86,sm89,sm120.  [default: the one that is here]",
)
@click.option("--max-batch", type=int, help="Sequences at once.  [default: 32]")
@click.option(
    "--max-len",
    type=int,
    help="Tokens of one sequence.  [default: 4096, or what the model takes if that is less]",
)
@click.option(
    "--trust",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take this engine from elsewhere for the bundle's, unseen. It is code that will run on "
    "your GPU: only if you know who built it, from this bundle, for this GPU and these sizes, with "
    "the library that is installed.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def engine(
    bundle: Path,
    *,
    targets: str | None,
    max_batch: int | None,
    max_len: int | None,
    trust: Path | None,
    quiet: bool,
) -> None:
    """Build TensorRT engines of BUNDLE, or take one from elsewhere.

    They lie in your cache folder, signed as yours; one that isn't is never loaded. llama-run builds
    what is missing itself.
    """
    from llama_export.engines import adopt_engine, wanted_engines

    wanted = wanted_engines("current" if targets is None else targets, max_batch, max_len)
    if trust is not None and wanted is not None:
        print_out(f"{adopt_engine(bundle, trust, wanted)}\n")
        return
    build_and_tell(bundle, wanted, quiet=quiet)


def build_and_tell(bundle: Path, wanted: Wanted | None, *, quiet: bool) -> None:
    """Build engines of a bundle, and print a line about each.

    Args:
        bundle: its directory.
        wanted: None where this machine can't build any, which is said.
        quiet: whether progress is left out.

    Raises:
        CaravanError: see ``engines.build_engines``.
    """
    from llama_export.engines import build_engines
    from llama_export.stages import Stages, stderr_stages

    if wanted is None:
        print_out("no engine was built: there is no TensorRT here, or no GPU that it runs on\n")
        return
    stages = Stages() if quiet else stderr_stages()
    with interrupts.last_act(lambda: "interrupted: engines that were finished are kept"):
        for line in build_engines(bundle, wanted, stages):
            print_out(f"{line}\n")
