"""Another type of a GGUF's weights, by llama.cpp's own quantiser.

    python -m scripts.peers.quantise_gguf IN.gguf OUT.gguf {q4_0 | q8_0}

llama.cpp has its fast products for Q4_0 on x86, and none for Q4_1.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Write OUT."""
    import llama_cpp

    source, output, name = sys.argv[1:]
    kinds = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kinds[name]
    params.allow_requantize = True
    if status := llama_cpp.llama_model_quantize(source.encode(), output.encode(), params):
        sys.exit(f"llama.cpp's quantiser failed with {status}")


if __name__ == "__main__":
    main()
