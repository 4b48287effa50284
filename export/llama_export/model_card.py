"""The README of a bundle, made from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_runtime.bundle import Manifest
from llama_runtime.contract import PAGED, SAMPLER, SLOTS, TENSORRT

# For each dialect, what it runs on and which extra of the package that needs.
TARGETS = {
    SLOTS.name: ("the CPU (cpu)", "cpu"),
    PAGED.name: ("an NVIDIA GPU (cuda)", "gpu"),
    TENSORRT.name: ("an NVIDIA GPU, as a TensorRT engine (tensorrt)", "tensorrt-rtx"),
}


def model_card(manifest: Manifest) -> str:
    """Markdown that says what the bundle is, where it comes from and how good it is."""
    geometry = manifest.geometry
    licence = manifest.licence.name or "not stated by the source"
    if manifest.licence.files:
        licence += f" (see {', '.join(manifest.licence.files)})"
    graphs = "\n".join(f"| {g.file} | {g.dialect} | {g.precision} |" for g in manifest.graphs)
    decoder = next(graph for graph in manifest.graphs if graph.dialect != SAMPLER)
    target, extra = TARGETS[decoder.dialect]
    tools = ", ".join(f"{name} {version}" for name, version in manifest.created_by.items())
    return f"""# {manifest.name}

A Caravan bundle: a Llama decoder as compiled graphs, ready to run without PyTorch.

    pip install 'llama-caravan[{extra}]'
    llama-run generate "Once upon a time" --bundle .

| | |
|---|---|
| source | {manifest.source.file} ({manifest.source.format}, sha256 {manifest.source.sha256}) |
| target, precision | {target}, {decoder.precision} |
| licence of the model | {licence} |
| layers, hidden size | {geometry.num_layers}, {geometry.hidden_size} |
| heads, KV heads, head dimension | {geometry.num_heads}, {geometry.num_kv_heads}, \
{geometry.head_dim} |
| vocabulary | {geometry.vocab_size:,} |
| longest sequence | {geometry.max_positions:,} tokens |

| graph | dialect | precision |
|---|---|---|
{graphs}

{_verification(manifest)}

Built with {tools}.
"""


def _verification(manifest: Manifest) -> str:
    figures: Mapping[str, Any] = manifest.verification
    sentences = []
    if manifest.source.format == "random":
        sentences.append("Its weights are random numbers: it is for measuring speed.")
    if "recipe" in figures:
        recipe = "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in figures["recipe"].items())
        sentences.append(f"How its weights were rounded: {recipe}.")
    if "weights_rows" in figures:
        sentences.append(
            f"Weights in {figures['weights_precision']} were compared with the source's on "
            f"{figures['weights_rows']} rows of logits: they differ by at most "
            f"{figures['weights_max_logit_difference']:.2g}, where the source's have a standard "
            f"deviation of {figures['weights_logit_spread']:.2g}, and "
            f"{figures['weights_greedy_agreement']:.1%} have the same likeliest token."
        )
    if "rows" in figures:
        sentences.append(
            f"Verified against its source on {figures['rows']} rows of logits from a ragged batch: "
            f"they differ by at most {figures['max_logit_difference']:.2g}, and "
            f"{figures['greedy_agreement']:.1%} have the same likeliest token."
        )
    elif "quality" in figures:
        quality = figures["quality"]
        sentences.append(
            f"Its predictions of {quality['tokens']:,} tokens of text were compared with the fp32 "
            f"source's: the mean KL divergence is {quality['mean_kl']:.2g} nats, "
            f"{quality['top1_agreement']:.1%} have the same likeliest token, and the perplexity is "
            f"{quality['perplexity_ratio']:.4f} times the source's."
        )
    else:
        sentences.append("The graph was not run when the bundle was built.")
    return " ".join(sentences)
