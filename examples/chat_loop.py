"""A conversation in thirty lines.

    python examples/chat_loop.py bundle

Each turn computes only what is new in it. ``llama-run chat`` is the comfortable one, with commands,
a history and files.
"""

from __future__ import annotations

import sys

from llama_runtime import LLM, CaravanError, RequestError, SamplingParams

PARAMS = SamplingParams(max_tokens=200, temperature=0.7)


def main(bundle: str = "bundle") -> None:
    """Read lines until there are no more."""
    messages = [{"role": "system", "content": "Answer in one or two sentences."}]
    with LLM(bundle, max_batch=1) as llm:
        print(f"{llm.bundle.manifest.name}; an empty line or Ctrl-D ends")
        while question := _read("> "):
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                stream = llm.stream(llm.chat_prompt(messages), PARAMS)
                for event in stream:
                    answer += event.text
                    print(event.text, end="", flush=True)
            except RequestError as error:  # no template, or no room for another turn
                print(f"error: {error}", file=sys.stderr)
                break
            messages.append({"role": "assistant", "content": answer})
            known = llm.stats().reused_tokens
            print(f"\n[prompt of {stream.num_prompt_tokens} tokens; {known} spared in all so far]")


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except CaravanError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
