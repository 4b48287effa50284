"""Schemas such as services send, all of which can be kept to, by name."""

from __future__ import annotations

from itertools import chain

from tests.structured.builders import Schema
from tests.structured.corpus.answers import ANSWERS
from tests.structured.corpus.arrays import ARRAYS
from tests.structured.corpus.configs import CONFIGS
from tests.structured.corpus.drafts import DRAFTS
from tests.structured.corpus.numbers import NUMBERS
from tests.structured.corpus.objects import OBJECTS
from tests.structured.corpus.payloads import PAYLOADS
from tests.structured.corpus.records import RECORDS
from tests.structured.corpus.rules import RULES
from tests.structured.corpus.strings import STRINGS
from tests.structured.corpus.tool_arguments import TOOL_ARGUMENTS
from tests.structured.corpus.trees import TREES
from tests.structured.corpus.unions import UNIONS

FAMILIES: dict[str, dict[str, Schema]] = {
    "records": RECORDS,
    "payloads": PAYLOADS,
    "configs": CONFIGS,
    "rules": RULES,
    "answers": ANSWERS,
    "tool arguments": TOOL_ARGUMENTS,
    "trees": TREES,
    "unions": UNIONS,
    "strings": STRINGS,
    "numbers": NUMBERS,
    "arrays": ARRAYS,
    "objects": OBJECTS,
    "drafts": DRAFTS,
}
SCHEMAS: dict[str, Schema] = dict(chain.from_iterable(f.items() for f in FAMILIES.values()))
