"""What a request may ask for, and the seeds that follow from one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from types import MappingProxyType
from typing import Any

import pytest

from llama_runtime.errors import RequestError
from llama_runtime.params import DRAWN_SEED_BITS, MAX_SEED, SamplingParams, fresh_seed, row_seed

NAN, INF = float("nan"), float("inf")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


IN_RANGE: dict[str, list[Any]] = {
    "max_tokens": [1, 2**31 - 1],
    "min_tokens": [0, 1, 256],
    "temperature": [0, 0.0, 1, 5e-324, 0.7, 100.0],
    "top_k": [0, 1, 2**31 - 1],
    "top_p": [5e-324, 0.9, 1, 1.0],
    "min_p": [0, 0.0, 5e-324, 0.05, 1],
    "repetition_penalty": [0.01, 1, 1.3, 100],
    "presence_penalty": [-2, 0, 0.5, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "logit_bias": [{}, {0: -100}, {2**31 - 1: 1.5, 3: 100}, dict.fromkeys(range(1024), 1)],
    "seed": [None, 0, 2**53, MAX_SEED],
    "n": [1, 2, 128],
    "stop": ["a", (), [], ["x" * 256], ("a", "b"), ["\N{SNOWMAN}"] * 16],
    "include_stop": [True, False],
    "stop_token_ids": [[], [0, 5], (7,), {1, 2}, frozenset({2**31 - 1}), iter([3])],
    "ignore_eos": [True, False],
    "logprobs": [True, False],
    "top_logprobs": [0, 1, 20],
    "prompt_logprobs": [True, False],
    "json_schema": [None, True, {}, {"type": "string"}, '{"type": "string"}', "true", " {} "],
    "regex": [None, "a", "x" * 2**16, "\N{SNOWMAN}"],
    "choice": [None, ["a"], ("a", "b"), ["x" * 64] * 1024],
    "grammar": [None, "start: /a/"],
    "speculation": ["off", "on", "auto"],
    "priority": [-100, 0, 100],
    "deadline": [None, 0, 0.5, 1e9],
    "caller": [None, "", "somebody", "x" * 256, "\N{SNOWMAN}"],
    "cache_salt": ["", "x" * 256, "\N{SNOWMAN}"],
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "min_tokens": [-1, 257, True, 1.0, NAN, INF, "1", None],
    "max_tokens": [0, -1, 2**31, 10**400, True, 1.0, 1.5, NAN, INF, "1", None, [1]],
    "temperature": [-0.1, -5e-324, 100.1, NAN, INF, -INF, 10**400, True, "0.7", None, [0.7], 1j],
    "top_k": [-1, 2**31, False, True, 1.0, NAN, INF, "1", None],
    "top_p": [0, 0.0, -0.1, 1.0000001, 2, NAN, INF, -INF, 10**400, True, "0.9", None],
    "min_p": [-5e-324, 1.0000001, 2, NAN, INF, -INF, 10**400, True, "0.1", None],
    "repetition_penalty": [0, 0.0, -1, 100.1, NAN, INF, True, "1", None],
    "presence_penalty": [-2.1, 2.1, NAN, INF, -INF, True, "1", None],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, -INF, True, "1", None],
    "logit_bias": [
        *(None, 5, "5", [(1, 2)], {-1: 1}, {2**31: 1}, {True: 1}, {"1": 1}, {1.0: 1}),
        *({1: 100.1}, {1: -101}, {1: NAN}, {1: INF}, {1: True}, {1: "1"}, {1: None}),
        dict.fromkeys(range(1025), 1),
    ],
    "n": [0, -1, 129, True, 1.0, NAN, "1", None],
    "stop": [
        *(None, 5, b"a", "", "x" * 257, [""], [5], [None], {"a": 1}, {"a"}, iter(["a"])),
        *(["a"] * 17, "\ud800", ["ok", "\udc00"]),
    ],
    "include_stop": [0, 1, None, "true", NAN],
    "seed": [-1, MAX_SEED + 1, True, 1.0, NAN, INF, "1"],
    "stop_token_ids": [5, None, 1.5, True, "2", [True], [-1], [2**31], [1.0], [None], [[1]]],
    "ignore_eos": [0, 1, None, "true", NAN],
    "logprobs": [0, 1, None, "true", 5],
    "top_logprobs": [-1, 21, True, 1.0, NAN, "1", None],
    "prompt_logprobs": [0, 1, None, "true", 5],
    "json_schema": [
        *(False, 5, [], "", "{", "[]", "5", "false", '"a"', b"{}", {"a": NAN}, {"a": b"a"}),
        *({"a": "x" * 2**16}, {"a": "\ud800"}, "[" * 10**6, '{"a":' * 65 + "1" + "}" * 65),
        {"a": nested(64)},
    ],
    "regex": [5, "", b"a", ["a"], "x" * (2**16 + 1), "\ud800"],
    "choice": [[], (), "a", 5, [5], [""], ["a", ""], ["a"] * 1025, ["x" * 2**16, "a"], ["\ud800"]],
    "grammar": [5, "", b"a", "x" * (2**16 + 1), "\ud800"],
    "speculation": [None, True, "", "On", 1],
    "priority": [-101, 101, 0.5, True, NAN, "1", None],
    "deadline": [-1, 1.1e9, NAN, INF, True, "1"],
    "caller": [5, True, b"a", "x" * 257, "\ud800", ["a"]],
    "cache_salt": [None, 5, b"a", "x" * 257, "\ud800"],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value!r:.12}")
        for name, values in table.items()
        for value in values
    ]


def test_every_parameter_is_in_the_tables() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == IN_RANGE.keys() == OUT_OF_RANGE.keys()


@pytest.mark.parametrize(("name", "value"), cases(IN_RANGE))
def test_values_in_range_are_taken(name: str, value: Any) -> None:
    expected = value
    if name == "stop_token_ids":
        value = list(value)
        expected = frozenset(value)
    if name == "stop":
        expected = (value,) if isinstance(value, str) else tuple(value)
    if name == "choice" and value is not None:
        expected = tuple(value)
    if name == "json_schema" and value is not None:
        schema = json.loads(value) if isinstance(value, str) else value
        expected = json.dumps({} if schema is True else schema, separators=(",", ":"))
    needs: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    assert getattr(SamplingParams(**{name: value}, **needs), name) == expected


@pytest.mark.parametrize(("name", "value"), cases(OUT_OF_RANGE))
def test_any_other_value_is_refused_by_the_parameters_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**{name: value})
    assert refusal.value.param == name
    assert str(refusal.value).startswith(name)


def test_a_refusal_says_the_value_and_the_limits() -> None:
    with pytest.raises(RequestError, match=r"^temperature must lie in 0 to 100, not 100\.5$"):
        SamplingParams(temperature=100.5)
    with pytest.raises(RequestError, match=r"^top_k must lie in 0 to 2147483647, not -3$"):
        SamplingParams(top_k=-3)
    with pytest.raises(RequestError, match=r"^max_tokens must be a whole number, not '12'$"):
        SamplingParams(max_tokens="12")  # type: ignore[arg-type]


def test_parameters_are_values() -> None:
    params = SamplingParams(stop_token_ids=[3, 1, 3])
    assert params == SamplingParams(stop_token_ids=frozenset({1, 3}))
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1  # type: ignore[misc]


def test_lists_do_as_well_for_the_type_checker_too() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids={3, 1})
    assert (params.stop, params.stop_token_ids) == (("a", "b"), frozenset({1, 3}))
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(choice=["yes", "no"]).choice == ("yes", "no")
    assert dataclasses.replace(params, stop=["c"]).stop == ("c",)


def test_temperature_0_and_only_that_is_greedy() -> None:
    assert SamplingParams().greedy
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=5e-324).greedy


def test_row_seeds_never_change() -> None:
    # Results record these, so another value would orphan every recorded seed.
    golden = {
        (0, 0): 508604106994858,
        (0, 1): 3963917667521872,
        (1, 0): 5843428001937822,
        (42, 7): 7758831524348246,
        (2**53 - 1, 99_999): 6333867862694746,
        (MAX_SEED, 2**40): 5854415212975578,
    }
    assert {key: row_seed(*key) for key in golden} == golden


@pytest.mark.parametrize(("seed", "row"), [(0, 0), (5, 2), (MAX_SEED, 3), (1 << 32, 1 << 33)])
def test_a_row_seed_is_the_documented_hash(seed: int, row: int) -> None:
    digest = hashlib.blake2b(struct.pack("<QQ", seed, row), digest_size=8).digest()
    (number,) = struct.unpack("<Q", digest)
    assert row_seed(seed, row) == number // 2**11


def test_row_seeds_of_a_job_are_all_different() -> None:
    for seed in (0, 1):
        assert len({row_seed(seed, row) for row in range(100_000)}) == 100_000


def test_row_seeds_of_two_jobs_share_nothing() -> None:
    first, second = ({row_seed(seed, row) for row in range(10_000)} for seed in (1, 2))
    assert not first & second


def test_drawn_seeds_survive_json_readers_with_doubles() -> None:
    seeds = {fresh_seed() for _ in range(200)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**DRAWN_SEED_BITS and int(float(seed)) == seed for seed in seeds)
    assert all(int(float(row_seed(1, row))) == row_seed(1, row) for row in range(1000))


def test_a_completion_is_held_to_one_thing() -> None:
    for first, second in (("regex", "grammar"), ("json_schema", "choice")):
        values: dict[str, Any] = {first: IN_RANGE[first][-1], second: IN_RANGE[second][-1]}
        with pytest.raises(RequestError, match="can't be given beside") as caught:
            SamplingParams(**values)
        assert caught.value.param in values
    for name, value in (("min_tokens", 1), ("ignore_eos", True)):
        options: dict[str, Any] = {name: value, "regex": "a"}
        with pytest.raises(RequestError, match=r"beside regex.*says where") as caught:
            SamplingParams(**options)
        assert caught.value.param == name


def test_a_schema_may_be_any_mapping() -> None:
    schema: Any = MappingProxyType({"properties": MappingProxyType({"a": MappingProxyType({})})})
    assert SamplingParams(json_schema=schema).json_schema == '{"properties":{"a":{}}}'


def test_a_schema_is_kept_as_text_that_nobody_changes() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"\N{SNOWMAN}": {"enum": [1, None]}}}
    params = SamplingParams(json_schema=schema)
    schema.clear()
    text = '{"type":"object","properties":{"\N{SNOWMAN}":{"enum":[1,null]}}}'
    assert params.json_schema == text
    assert dataclasses.replace(params, seed=1).json_schema == text
    assert SamplingParams(json_schema=text.replace(",", " , ")).constraint == params.constraint
    assert hash(params) == hash(SamplingParams(json_schema=text))
