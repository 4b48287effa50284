"""What a server makes of a real model is what ``LLM.generate`` makes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import requests

from llama_runtime.llm import LLM
from scripts.conformance_requests import Asked, expected, served
from scripts.conformance_requests import requests as made_requests
from scripts.findings import Findings
from scripts.serving_process import Server

COUNT, AT_ONCE = 200, 40
LONGEST, MOST = 120, 12  # characters of a prompt, tokens of a completion


def prove(server: Server, llm: LLM, findings: Findings, *, seed: int) -> None:
    """Ask both the same, and compare texts, tokens and log-probabilities, to the last bit.

    Args:
        server: to ask.
        llm: the same model, in fp32: other arithmetic rounds by the company.
        findings: what is found.
        seed: of the requests.
    """
    asked = made_requests(COUNT, seed=seed, longest=LONGEST, most=MOST)
    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}

    def ask(one: Asked) -> object:
        url = f"http://127.0.0.1:{server.port}{one.path}"
        body = one.body | {"model": server.model}
        answer = requests.post(url, json=body, headers=headers, timeout=600)
        if answer.status_code != 200:
            return answer.text
        return served(one, answer.content)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        given = list(pool.map(ask, asked))
    for one, found, wanted in zip(asked, given, expected(llm, asked), strict=True):
        findings.hold("what is served is what LLM makes", found == wanted, (one, found, wanted))
    findings.figures["tokens compared"] = sum(
        len(tokens or [])
        for choices in given
        if isinstance(choices, list)
        for *_, tokens in choices
    )
