#!/usr/bin/env python3
"""Convert a GGUF checkpoint for ONNX Runtime GenAI, by its own builder, fp32 for the CPU.

usage: scripts/make_genai_model.py MODEL.gguf OUTPUT

The weights are dequantised by transformers, so the benchmark's peer computes with the same numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Make OUTPUT, or leave nothing behind."""
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").split("\n\n")[1])
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".genai-", dir=output.parent) as scratch:
        source, built = Path(scratch, "source"), Path(scratch, "built")
        dequantise(model, source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(source), "-o", str(built), "-p", "fp32", "-e", "cpu"]
        command += ["--extra_options", "hf_token=false"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"onnxruntime_genai's builder failed:\n{done.stderr[-2000:]}")
        built.rename(output)


def dequantise(model: Path, directory: Path) -> None:
    """Write a GGUF file as the Hugging Face directory of float32 that transformers reads it as."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers' own switch leaves some bars on
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, file = str(model.parent), model.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # what was dequantised can't be saved under it
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(directory)


if __name__ == "__main__":
    main()
