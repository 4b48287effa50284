"""What a bundle keeps of the source's predictions is what transformers predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llama_export.quality import cut_windows, reference_logprobs
from llama_export.sources import open_source
from llama_runtime.tokenizer import Tokenizer
from tests.evaluated import SHA256, TEXTS


def test_the_reference_is_what_transformers_predicts(tiny_model: Path) -> None:
    source = open_source(tiny_model)
    windows = cut_windows(Tokenizer(tiny_model / "tokenizer.json"), TEXTS, 256)
    reference = reference_logprobs(source.config, source.weights(), windows, SHA256)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    kept = reference.kept(slice(None))
    for window, start in zip(windows, reference.starts[:-1].tolist(), strict=True):
        rows = slice(start, start + window.num_targets)
        with torch.no_grad():
            logits = model(torch.tensor([window.tokens[:-1]])).logits[0]
        expected = logits.double().log_softmax(1).numpy()
        targets = expected[np.arange(len(expected)), window.tokens[1:]]
        np.testing.assert_allclose(reference.targets[rows], targets, atol=1e-4)
        for ids, found in (
            (reference.top_ids[rows], kept.parts[rows, :-1]),
            (reference.sample_ids[rows], kept.samples[rows]),
        ):
            wanted = np.take_along_axis(expected, ids, axis=1)
            np.testing.assert_allclose(found, wanted, atol=1e-3)
