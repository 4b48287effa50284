"""What OpenVINO's pipeline predicts after each token, which the pipeline itself doesn't give.

Its model is brought into the form that the pipeline runs, with paged attention, and compiled with
the same properties; so the plugin's own choices are those of the pipeline, its 8-bit cache
included. The pipeline gives the log-probability of each token of a prompt, and those are compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

# Nats. Both come from the same kernels; the pipeline's sum over the vocabulary is less exact.
TOLERANCE = 2e-3


class Reader:
    """A model with a cache for one sequence.

    Args:
        model: a directory with OpenVINO's files, or a GGUF.
        properties: as for the pipeline.
    """

    def __init__(self, model: Path, properties: dict[str, Any]) -> None:
        import openvino
        from openvino._offline_transformations import paged_attention_transformation

        self._api: Any = openvino
        with tempfile.TemporaryDirectory(prefix="openvino-") as scratch:
            folder = model if model.is_dir() else _converted(model, Path(scratch), properties)
            core = openvino.Core()
            graph = core.read_model(str(folder / "openvino_model.xml"))
            paged_attention_transformation(graph)
            self._compiled: Any = core.compile_model(graph, "CPU", properties)
        self._request: Any = self._compiled.create_infer_request()
        self._caches = {
            port.any_name: port for port in self._compiled.inputs if "_cache." in port.any_name
        }
        # [blocks, heads, tokens of a block, columns]; keys may have rows of scales beside them
        values = self._caches["value_cache.0"].partial_shape
        self._block = values[2].get_length()

    def logits(self, tokens: list[int]) -> Any:
        """Float32 [T, V], from an empty cache on; in one step, as the pipeline reads a prompt."""
        import numpy as np

        count, blocks = len(tokens), -(-len(tokens) // self._block)
        for name, port in self._caches.items():
            shape = [blocks if d.is_dynamic else d.get_length() for d in port.partial_shape]
            self._request.set_tensor(name, self._api.Tensor(port.element_type, shape))
        inputs = {
            "input_ids": np.array(tokens, np.int64),
            "position_ids": np.arange(count, dtype=np.int64),
            "max_context_len": np.array(count, np.int32),
            "past_lens": np.array([0], np.int32),
            "subsequence_begins": np.array([0, count], np.int32),
            "block_indices_begins": np.array([0, blocks], np.int32),
            "block_indices": np.arange(blocks, dtype=np.int32),
        }
        return self._request.infer(inputs)["logits"][:, 0]


def check(logits: Any, tokens: list[int], pipeline: Any) -> None:
    """Compare with the log-probabilities that the pipeline gives tokens of a prompt.

    Args:
        logits: [T, V], what is predicted after each of the tokens.
        tokens: T of them.
        pipeline: a ``ContinuousBatchingPipeline`` on the same model, idle.

    Raises:
        ValueError: one differs by more than ``TOLERANCE``.
    """
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.logprobs = 1
    config.echo = config.ignore_eos = True
    config.do_sample = config.apply_chat_template = False
    handle = pipeline.add_request(0, openvino.Tensor(np.array([tokens], np.int64)), config)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    theirs = np.array(handle.read_all()[0].generated_log_probs[1 : len(tokens)])
    rows = logits[:-1].astype(np.float64)
    peaks = rows.max(axis=1)
    sums = peaks + np.log(np.exp(rows - peaks[:, None]).sum(axis=1))
    ours = rows[np.arange(len(rows)), tokens[1:]] - sums
    apart = float(abs(ours - theirs).max())
    if not apart <= TOLERANCE:
        raise ValueError(
            f"its pipeline predicts other tokens: a log-probability is {apart:.2g} off"
        )


def _converted(model: Path, scratch: Path, properties: dict[str, Any]) -> Path:
    """OpenVINO's files of a GGUF, made by its own reader, which puts them beside the file."""
    import openvino_genai

    link = scratch / model.name
    link.symlink_to(model.absolute())
    openvino_genai.LLMPipeline(str(link), "CPU", **properties, enable_save_ov_model=True)
    return scratch
