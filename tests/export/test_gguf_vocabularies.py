"""GGUF tokenizers over small vocabularies made by hand: byte-level BPE and SentencePiece."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llama_decoder.errors import CheckpointError
from llama_export.errors import ExportError
from llama_export.gguf_tokenizer import read_gguf_tokenizer

LLAMA3_WORDS = (  # as published with Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

Metadata = dict[str, Any]


def build(metadata: Metadata) -> Tokenizer:
    return Tokenizer.from_buffer(read_gguf_tokenizer(metadata).tokenizer_json)


def end_ids(metadata: Metadata) -> object:
    return read_gguf_tokenizer(metadata).generation_config["eos_token_id"]


def byte_level(
    *added: tuple[str, int], merges: tuple[str, ...] = (), words: tuple[str, ...] = (), **keys: Any
) -> Metadata:
    """The 256 bytes, what the merges make, then words that no merge makes, then added tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in merges] + list(words)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens + [text for text, _ in added],
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [kind for _, kind in added],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentencepiece(*pieces: str, **keys: Any) -> Metadata:
    """The pieces by falling score, after the tokens that every such vocabulary begins with."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *pieces],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
        + [NORMAL] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_llama_3_ids_are_those_of_the_published_tokenizer_with_the_same_vocabulary() -> None:
    merges = ("Ġ t", "h e", "Ġt he", "1 2", "3 4", "12 34", "Ċ Ċ", "' s", "Ġ Ġ", "! !")
    metadata = byte_level(merges=merges, words=("Ġnever", "123", "!Ċ", "1234567"))
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    pairs = [(left, right) for left, right in (merge.split() for merge in merges)]
    published = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = build(metadata)
    rng = random.Random(7)
    bits = " the, never,12,34,1234567,\n, ,'s,'S,!,!!,é,\r,x"
    for _ in range(500):
        text = "".join(rng.choices(bits.split(","), k=rng.randrange(12)))
        assert ours.encode(text).ids == published.encode(text).ids


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("llama-bpe", ["x", "Ġ", "123", "4", "ĊĊ", "Ġ", "Ġy", "'LL", "Ġ", "Ġ", "7", "!Ċ"]),
        ("smollm", ["x", "Ġ", "1", "2", "3", "4", "ĊĊĠ", "Ġy", "'", "LL", "ĠĠ", "7", "!", "Ċ"]),
        ("gpt-2", ["x", "Ġ1234", "ĊĊĠ", "Ġy", "'", "LL", "Ġ", "Ġ7", "!", "Ċ"]),
        ("qwen2", ["x", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġ", "Ġy", "'LL", "Ġ", "Ġ", "7", "!Ċ"]),
        ("default", ["x", "Ġ", "123", "4", "ĊĊĠ", "Ġy", "'", "LL", "Ġ", "Ġ", "7", "!", "Ċ"]),
    ],
)
def test_numbers_after_spaces_and_newlines_are_cut_in_each_models_way(
    pre: str, tokens: list[str]
) -> None:
    cut = build(byte_level(pre=pre)).pre_tokenizer.pre_tokenize_str("x 1234\n\n  y'LL  7!\n")
    assert [word for word, _ in cut] == tokens


def test_a_word_that_is_a_token_needs_no_merges_only_where_the_model_says_so() -> None:
    assert build(byte_level(words=("never",))).encode("never").tokens == ["never"]
    assert build(byte_level(words=("never",), pre="gpt-2")).encode("never").tokens == list("never")


def test_a_byte_without_a_token_is_dropped_and_still_keeps_its_neighbours_apart() -> None:
    metadata = byte_level(merges=("! !",), pre="smollm")
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("Ą")] = "unreachable"
    tokenizer = build(metadata)
    assert tokenizer.encode("!!").tokens == ["!!"]
    assert tokenizer.encode("!\x04!").tokens == ["!", "!"]


def test_of_a_merge_that_comes_twice_the_first_counts() -> None:
    metadata = byte_level(merges=("a b", "b c"))
    metadata["tokenizer.ggml.merges"].append("a b")
    assert build(metadata).encode("abc").tokens == ["ab", "c"]


def naive_sentencepiece(text: str, metadata: Metadata) -> list[int]:
    """Join the best pair anywhere, the leftmost of equals, until none is left."""
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [
            (scores[ids[left + right]], -place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [
        token_id
        for symbol in symbols
        for token_id in ([ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()])
    ]


def test_sentencepiece_joins_the_best_scored_neighbours_first() -> None:
    rng = random.Random(5)
    for alphabet in ("▁", "a▁", "ab▁", "abc▁"):
        for _ in range(25):
            pieces = list(alphabet)
            for _ in range(12):
                pieces.append("".join(rng.choices(pieces, k=2)))
            joined = list(dict.fromkeys(piece for piece in pieces if len(piece) > 1))
            rng.shuffle(joined)
            metadata = sentencepiece(*joined, *alphabet)
            tokenizer = build(metadata)
            for _ in range(20):
                letters = alphabet.replace("▁", " ") + rng.choice("\né")
                text = "".join(rng.choices(letters, k=rng.randrange(30)))
                found = tokenizer.encode(text, add_special_tokens=False).ids
                assert found == naive_sentencepiece(text, metadata)


def test_sentencepiece_by_hand() -> None:
    tokenizer = build(sentencepiece("▁a", "ab", "▁", "a", "b"))
    assert tokenizer.encode("ab").tokens == ["<s>", "▁a", "b"]  # ▁a scores better than ab
    assert tokenizer.encode("").tokens == ["<s>"]
    assert tokenizer.encode("aab é\n").tokens == [
        *("<s>", "▁a", "ab", "▁", "<0xC3>", "<0xA9>", "<0x0A>"),
    ]


def test_a_space_is_put_before_text_that_follows_a_special_token_too() -> None:
    tokenizer = build(sentencepiece("▁a", "▁", "a"))
    assert tokenizer.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]
    tokenizer = build(sentencepiece("▁a", "▁", "a", add_space_prefix=False))
    assert tokenizer.encode("a</s> a").tokens == ["<s>", "a", "</s>", "▁a"]
    assert tokenizer.decode(tokenizer.encode(" a", add_special_tokens=False).ids) == " a"


def test_user_defined_tokens_are_found_and_shown_even_where_special_ones_are_text() -> None:
    tokenizer = build(byte_level(("<tool>", USER_DEFINED), ("<|x|>", CONTROL), ("<u>", UNKNOWN)))
    ids = tokenizer.encode("<tool><|x|><u>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<tool>", "<|x|>", "<u>"]
    assert tokenizer.decode(ids) == "<tool>"
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<tool><u>").tokens == ["<tool>", "<", "u", ">"]


@pytest.mark.parametrize(
    ("pre", "adds"),
    [("llama-bpe", True), ("llama3", True), ("llama-v3", True), ("falcon3", True)]
    + [(pre, False) for pre in ("smollm", "starcoder", "refact", "gpt-2", "qwen2", "default")],
)
def test_bos_is_added_where_llama_cpp_adds_it_unless_the_file_says_otherwise(
    pre: str, adds: bool
) -> None:
    metadata = byte_level(("<b>", CONTROL), pre=pre, bos_token_id=256)
    said = [build(metadata | {"tokenizer.ggml.add_bos_token": flag}) for flag in (True, False)]
    del metadata["tokenizer.ggml.add_bos_token"]
    found = [tokenizer.encode("a").tokens for tokenizer in (build(metadata), *said)]
    assert found == [["<b>", "a"] if adds else ["a"], ["<b>", "a"], ["a"]]


def test_eos_is_added_only_where_the_file_says_so() -> None:
    metadata = byte_level(("<e>", CONTROL), eos_token_id=256, add_eos_token=True)
    assert build(metadata).encode("a").tokens == ["a", "<e>"]
    metadata = sentencepiece("a", "▁", add_eos_token=True)
    assert build(metadata).encode("").tokens == ["<s>", "</s>"]


def test_end_ids_come_from_keys_and_from_texts() -> None:
    added = [("<|end_of_text|>", CONTROL), ("<|eot_id|>", NORMAL), ("<|eom_id|>", USER_DEFINED)]
    added += [("<e>", CONTROL), ("<t>", CONTROL), ("<|repo_name|>", NORMAL), ("<|x|>", CONTROL)]
    metadata = byte_level(*added, eos_token_id=259, eot_token_id=260)
    assert end_ids(metadata) == [259, 260, 256, 257, 258, 261]
    assert end_ids(metadata | {"tokenizer.ggml.fim_rep_token_id": 262})[-1:] == [262]  # type: ignore[index]
    tokenizer = build(metadata)
    assert tokenizer.decode([256, 257, 258, 261]) == ""  # they became control tokens
    tokenizer.encode_special_tokens = True
    assert len(tokenizer.encode("<|eot_id|>").ids) > 1


def test_an_id_beyond_the_vocabulary_counts_as_absent(caplog: pytest.LogCaptureFixture) -> None:
    source = read_gguf_tokenizer(sentencepiece("a", padding_token_id=32000, eos_token_id=32000))
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert "tokenizer.ggml.padding_token_id is 32000, but the last token is 259" in caplog.text


def test_sampling_values_are_published_and_switch_sampling_on() -> None:
    metadata = byte_level()
    assert read_gguf_tokenizer(metadata).generation_config == {"eos_token_id": []}
    metadata |= {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 50}
    assert read_gguf_tokenizer(metadata).generation_config == {
        "eos_token_id": [],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", r"tokenizer.ggml.model .* is 'bert'; only 'gpt2' and 'llama'"),
        ("model", None, r"tokenizer.ggml.model .* is None"),
        ("pre", None, r"have no tokenizer.ggml.pre"),
        ("pre", "tekken", r"tokenizer.ggml.pre .* is 'tekken'; supported are smollm, "),
        ("tokens", None, r"tokenizer.ggml.tokens .* is None; it must be a list of str"),
        ("tokens", [], r"tokenizer.ggml.tokens .* is empty"),
        ("tokens", ["a", "a"], r"tokenizer.ggml.tokens .* has 'a' more than once"),
        ("token_type", [1], r"tokenizer.ggml.token_type .* has 1 values for 256 tokens"),
        ("token_type", [9] * 256, r"tokenizer.ggml.token_type .* has \[9\]; supported are 0 to 6"),
        ("merges", None, r"tokenizer.ggml.merges .* is None; it must be a list of str"),
        ("merges", ["ab"], r"tokenizer.ggml.merges .* has 'ab'; a merge must be"),
        ("merges", ["a b"], r"the tokenizer in the GGUF metadata is not a usable tokenizer"),
        ("add_bos_token", True, r"wants BOS .* no valid tokenizer.ggml.bos_token_id"),
        ("add_eos_token", True, r"wants EOS .* no valid tokenizer.ggml.eos_token_id"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_gguf_tokenizer(byte_level() | {f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", None, r"tokenizer.ggml.scores .* is None; it must be a list of float"),
        ("scores", [0.0], r"tokenizer.ggml.scores .* has 1 values for 260 tokens"),
        ("tokens", ["<unk>", "<0x00>"], r"lacks 255 of the 256 byte tokens, <0x01> for one"),
    ],
)
def test_an_incomplete_sentencepiece_vocabulary_is_refused(
    key: str, value: object, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        read_gguf_tokenizer(sentencepiece("a") | {f"tokenizer.ggml.{key}": value})


def test_a_value_of_the_wrong_type_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.add_bos_token .* true or false"):
        read_gguf_tokenizer(byte_level(add_bos_token="yes"))
