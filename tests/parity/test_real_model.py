"""On the real model, greedy tokens are those of transformers.

transformers reads the same GGUF file with its own code and is fed the same token ids. Its logits
for prompt and completion together say at each place which token greedy decoding takes there, so
one forward a prompt settles all 48 tokens.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams

NUM_TOKENS = 48
NEAR_TIE = 1e-3
TOPICS = (
    "The capital of Peru is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "La mitocondria es",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "SELECT name, age FROM users WHERE",
)
QUESTIONS = (
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a haiku about llamas.",
    "What is 7 times 8?",
    "Name three robots.",
    "Explain recursion to a child.",
    "Translate 'good morning' into French.",
    "What should I pack for a week in the mountains?",
)


@pytest.fixture(scope="module")
def prompts_and_completions(real_bundle: Path) -> list[tuple[list[int], list[int]]]:
    with LLM(real_bundle, max_batch=16, max_len=512) as llm:
        prompts = [llm.tokenizer.encode(topic) for topic in TOPICS]
        prompts += [llm.chat_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
        # Longer ones, over several chunks: the same texts behind others.
        prompts += [prompts[i] + prompts[-i - 1] + prompts[i // 2] for i in range(8)]
        prompts += [[*chain(*prompts[i + 8 : i + 12])] for i in range(8)]
        assert len(prompts) == 32
        assert sum(len(prompt) > 128 for prompt in prompts) >= 4
        params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        completions = llm.generate(prompts, params)
    return [(p, c.token_ids) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="module")
def reference(real_gguf: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
    )
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # what transformers warns of while reading GGUF is its own
def test_greedy_tokens_are_those_of_transformers(
    prompts_and_completions: list[tuple[list[int], list[int]]], reference: torch.nn.Module
) -> None:
    for prompt, completion in prompts_and_completions:
        assert len(completion) == NUM_TOKENS
        with torch.no_grad():
            ids = torch.tensor([prompt + completion])
            rows = reference(ids, logits_to_keep=NUM_TOKENS + 1).logits[0, :-1]
        differing = (rows.argmax(dim=-1) != torch.tensor(completion)).nonzero().flatten().tolist()
        if differing:
            first = differing[0]  # what follows a first difference is another text
            best, second = rows[first].topk(2).values.tolist()
            assert best - second < NEAR_TIE, f"token {first} after {prompt[-8:]}"
            assert completion[first] in rows[first].topk(2).indices.tolist()
