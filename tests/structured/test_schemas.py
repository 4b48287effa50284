"""What a schema's mask allows is valid under the schema, by somebody else's verdict.

No model is asked: tokens are drawn at random from those that the mask allows, so they go where no
model would. ``scripts/prove_structured`` draws longer and asks the real model too.
"""

from __future__ import annotations

import json

import pytest
from jsonschema.validators import Draft202012Validator, validator_for

from llama_runtime.errors import RequestError
from llama_runtime.params import SamplingParams
from tests.structured.schemas import FAMILIES, SCHEMAS
from tests.structured.unsupported import UNSUPPORTED
from tests.structured.walks import Walker, complaint

MAX_TOKENS = 250
LEAST_FINISHED = 0.6  # of a family's texts; those of wide forms need more tokens


def test_the_corpus_holds_more_than_220_schemas() -> None:
    written = {json.dumps(schema, sort_keys=True) for schema in SCHEMAS.values()}
    assert len(written) == sum(map(len, FAMILIES.values())) > 220
    for schema in SCHEMAS.values():
        validator_for(schema, default=Draft202012Validator).check_schema(schema)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_mask_allows_is_valid(family: str, walker: Walker) -> None:
    num_finished = 0
    for name, schema in FAMILIES[family].items():
        walk = walker.walk(schema, seed=0, max_tokens=MAX_TOKENS)
        if walk.finished:
            num_finished += 1
            assert complaint(schema, walk.text) is None, f"{name}: {walk.text}"
    assert num_finished >= LEAST_FINISHED * len(FAMILIES[family])


@pytest.mark.parametrize(("schema", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_cannot_be_kept_to_is_refused_by_name(
    schema: dict[str, object], named: str, walker: Walker
) -> None:
    constraint = SamplingParams(json_schema=schema).constraint
    assert constraint is not None
    with pytest.raises(RequestError) as refusal:
        walker.compiler.prepare(constraint)
    assert refusal.value.param == "json_schema"
    assert named in str(refusal.value)
