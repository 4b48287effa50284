#!/usr/bin/env python3
"""Build time, peak memory and size of TensorRT engines, each in a process of its own.

usage: scripts/bench_tensorrt_build.py BUNDLE[=GPU]...

Each BUNDLE was built with --target tensorrt; the GPU is sm86 unless it is said. Nothing is kept.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """A line for each bundle."""
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        measure(Path(sys.argv[2]), sys.argv[3])
        return
    if len(sys.argv) < 2:
        sys.exit((__doc__ or "").split("\n\n")[1])
    for text in sys.argv[1:]:
        bundle, _, target = text.partition("=")
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, __file__, "--one", bundle, target or "sm86"],
                env={**os.environ, "XDG_CACHE_HOME": cache},
                capture_output=True,
                text=True,
                check=False,
            )
        print(done.stdout.strip() or done.stderr.strip().splitlines()[-1], flush=True)


def measure(path: Path, target: str) -> None:
    """Build one engine and print its figures."""
    from llama_runtime import open_bundle
    from llama_runtime.tensorrt.engine_build import WEIGHTS, build_engine
    from llama_runtime.tensorrt.library import import_tensorrt
    from llama_runtime.tensorrt.limits import EngineLimits
    from llama_runtime.tensorrt.local_engine import activations

    bundle, library = open_bundle(path, verify="size"), import_tensorrt()
    geometry = bundle.manifest.geometry
    built = build_engine(
        bundle.graph_path("tensorrt"),
        geometry,
        EngineLimits(32, min(4096, geometry.max_positions)),
        precision=activations(bundle),
        targets=(target,),
        library=library,
    )
    weights = (path / WEIGHTS).stat().st_size
    figures = {
        "bundle": bundle.manifest.name,
        "precision": bundle.manifest.graphs[0].precision,
        "library": f"{library.name} {library.version}",
        "target": target,
        "weights_mb": round(weights / 1e6, 1),
        "engine_mb": round(built.plan.nbytes / 1e6, 1),
        "engine_over_weights": round(built.plan.nbytes / weights, 3),
        "seconds": round(built.seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
