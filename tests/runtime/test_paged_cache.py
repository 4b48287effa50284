"""Blocks have as many owners as tables name them, and prompts that begin alike share them."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from llama_runtime import prefixes
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.paged_cache import PagedCache
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
SIZE = 4  # tokens of a block, in all of these tests
ONE, TWO, THREE = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]  # what fills one
_ids = count()


def sequence(prompt: list[int], max_tokens: int = 1, **params: Any) -> Sequence:
    return Sequence(
        id=next(_ids),
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=0,
        detokenizer=Detokenizer(TABLE),
    )


def pool(num_blocks: int, num_slots: int = 8, **options: Any) -> PagedCache:
    return PagedCache(num_slots, 100, num_blocks, SIZE, **options)


def admit(cache: PagedCache, prompt: list[int], max_tokens: int = 1, **params: Any) -> Sequence:
    seq = sequence(prompt, max_tokens, **params)
    assert cache.fits(seq)
    cache.allocate(seq)
    cache.check()
    return seq


def advance(cache: PagedCache, seq: Sequence, num_tokens: int) -> None:
    """What a step that runs some tokens of a sequence does."""
    seq.cache_len += num_tokens
    cache.computed(seq)
    cache.check()


def compute(cache: PagedCache, seq: Sequence) -> Sequence:
    """Run all there is of a sequence."""
    advance(cache, seq, seq.num_tokens - seq.cache_len)
    return seq


def serve(cache: PagedCache, prompt: list[int], max_tokens: int = 1, **params: Any) -> list[int]:
    """Admit, run and free a sequence; the blocks it had."""
    seq = compute(cache, admit(cache, prompt, max_tokens, **params))
    blocks = list(cache.table(seq))
    cache.free(seq)
    cache.check()
    return blocks


# --- slots and blocks ---------------------------------------------------------------------------


def test_the_lowest_free_slot_is_handed_out_first() -> None:
    cache = pool(8, num_slots=4)
    seqs = [admit(cache, [1]) for _ in range(4)]
    assert [seq.slot for seq in seqs] == [0, 1, 2, 3]
    for i in (2, 0, 3):
        cache.free(seqs[i])
    assert cache.num_free == 3
    assert [admit(cache, [1]).slot for _ in range(2)] == [0, 2]
    assert [seq.slot for seq in seqs] == [None, 1, None, None]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "num_blocks"),
    [(1, 1, 1), (3, 1, 1), (4, 1, 2), (1, 7, 2), (1, 8, 3), (9, 20, 8)],
)
def test_a_sequence_gets_all_blocks_it_may_ever_need(
    num_prompt_tokens: int, max_tokens: int, num_blocks: int
) -> None:
    cache = pool(10)
    seq = admit(cache, [1] * num_prompt_tokens, max_tokens)
    assert len(set(cache.table(seq))) == len(cache.table(seq)) == num_blocks
    assert cache.num_free_blocks == 10 - num_blocks
    cache.free(seq)
    assert (cache.num_free, cache.num_free_blocks) == (8, 10)


def test_a_new_owner_starts_with_an_empty_cache() -> None:
    cache, seq = pool(2), sequence([1, 2, 3])
    seq.cache_len = 3
    cache.allocate(seq)
    assert seq.cache_len == 0


def test_what_does_not_fit_changes_nothing() -> None:
    cache = pool(5, num_slots=2)
    first = admit(cache, ONE, max_tokens=5)
    large = sequence([1], max_tokens=8)  # 3 blocks, of which 2 are left
    assert not cache.fits(large)
    with pytest.raises(RuntimeError, match="can't be given a slot and blocks"):
        cache.allocate(large)
    assert (large.slot, cache.num_free, cache.num_free_blocks) == (None, 1, 2)
    admit(cache, [1])
    assert cache.num_free_blocks == 1
    assert not cache.fits(sequence([1]))  # no slot
    cache.free(first)
    assert cache.fits(large)


def test_a_sequence_that_runs_is_not_allocated_again() -> None:
    cache = pool(4)
    seq = admit(cache, [1])
    with pytest.raises(RuntimeError, match="can't be given"):
        cache.allocate(seq)
    cache.check()


@pytest.mark.parametrize(
    "use",
    [
        PagedCache.free,
        PagedCache.computed,
        PagedCache.forget,
        PagedCache.table,
        PagedCache.reuse,
        PagedCache.next_block,
    ],
)
def test_only_the_owner_can_use_a_slot_and_only_until_it_is_free(
    use: Callable[[PagedCache, Sequence], object],
) -> None:
    cache, stranger = pool(4), sequence([1])
    owner = admit(cache, [1])
    stranger.slot = owner.slot
    with pytest.raises(RuntimeError, match=f"sequence {stranger.id} does not hold slot 0"):
        use(cache, stranger)
    cache.check()
    owner.slot = 1
    with pytest.raises(RuntimeError, match=f"sequence {owner.id} does not hold slot 1"):
        use(cache, owner)
    owner.slot = 0
    cache.free(owner)
    with pytest.raises(RuntimeError, match=f"sequence {owner.id} does not hold slot None"):
        use(cache, owner)
    assert (cache.num_free, cache.num_free_blocks) == (8, 4)
    cache.check()


# --- sharing ------------------------------------------------------------------------------------


def test_a_prompt_shares_the_full_blocks_that_it_begins_with() -> None:
    cache = pool(12)
    first = compute(cache, admit(cache, [*ONE, *TWO, 0]))
    second = admit(cache, [*ONE, *TWO, *THREE])
    third = admit(cache, [*ONE, *THREE, *TWO])
    assert (first.cache_len, second.cache_len, third.cache_len) == (9, 8, 4)
    assert cache.table(second)[:2] == cache.table(first)[:2]
    assert cache.table(third)[:1] == cache.table(first)[:1]
    assert len({*cache.table(first), *cache.table(second), *cache.table(third)}) == 3 + 2 + 3
    assert cache.num_reused_tokens == 12


def test_a_block_is_shared_only_once_all_of_it_is_computed() -> None:
    cache = pool(12)
    first = admit(cache, [*ONE, *TWO, 0])
    for num_tokens, num_shared in [(3, 0), (1, 4), (3, 4), (1, 8), (1, 8)]:
        advance(cache, first, num_tokens)
        probe = admit(cache, [*ONE, *TWO, 1])
        assert probe.cache_len == num_shared
        cache.free(probe)


def test_a_token_of_the_prompt_is_left_to_compute() -> None:
    cache = pool(12)
    serve(cache, [*ONE, *TWO])
    assert admit(cache, [*ONE, *TWO]).cache_len == 4
    assert admit(cache, [*ONE, *TWO, 0]).cache_len == 8  # its last full block was registered


def test_a_completion_is_not_shared() -> None:
    cache = pool(12)
    seq = compute(cache, admit(cache, [1, 2, 3], max_tokens=6))
    for token_id in [4, *TWO]:
        seq.append(token_id)
        compute(cache, seq)
    assert admit(cache, [*ONE, *TWO, 0]).cache_len == 0


def test_equal_tokens_after_other_tokens_are_other_content() -> None:
    cache = pool(12)
    serve(cache, [*ONE, *TWO, 0])
    assert admit(cache, [*THREE, *TWO, 0]).cache_len == 0
    assert admit(cache, [*TWO, 0]).cache_len == 0


@pytest.mark.parametrize("place", range(8))
def test_each_token_is_part_of_the_content(place: int) -> None:
    cache, other = pool(12), [*ONE, *TWO, 0]
    serve(cache, other)
    other[place] += 1
    assert admit(cache, other).cache_len == place // SIZE * SIZE


def test_each_prompt_has_its_own_content_whoever_was_asked_about_before() -> None:
    cache, waiting = pool(12), sequence([*TWO, 0])
    assert cache.fits(waiting)
    serve(cache, [*ONE, 0])
    assert cache.fits(waiting)
    assert admit(cache, [*ONE, 0]).cache_len == 4
    cache.allocate(waiting)
    assert waiting.cache_len == 0


def test_a_prompt_whose_rows_are_scored_shares_nothing_but_is_shared() -> None:
    cache = pool(12)
    blocks = serve(cache, [*ONE, 0], prompt_logprobs=True)
    assert admit(cache, [*ONE, 0], prompt_logprobs=True).cache_len == 0
    seq = admit(cache, [*ONE, 0])
    assert (seq.cache_len, cache.table(seq)[0]) == (4, blocks[0])


def test_of_two_blocks_with_the_same_content_the_first_stays_registered() -> None:
    cache = pool(12)
    first, second = admit(cache, [*ONE, 0]), admit(cache, [*ONE, 0])
    compute(cache, second)
    compute(cache, first)
    assert cache.table(first)[0] != cache.table(second)[0]
    for _ in range(2):  # whoever else has gone
        third = admit(cache, [*ONE, 0])
        assert cache.table(third)[0] == cache.table(second)[0]
        cache.free(third)
        if first.slot is not None:
            cache.free(first)


def test_a_block_lasts_until_all_who_share_it_are_gone() -> None:
    cache = pool(4)
    first = compute(cache, admit(cache, [*ONE, 0]))
    second = admit(cache, [*ONE, 0])
    cache.free(first)
    assert cache.num_free_blocks == 2
    others = [admit(cache, [7]), admit(cache, [7])]
    assert cache.num_free_blocks == 0
    assert not {*cache.table(others[0]), *cache.table(others[1])} & {*cache.table(second)}
    cache.free(second)
    assert cache.num_free_blocks == 2


def test_without_sharing_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(prefixes, "blake2b")
    cache = pool(12, share_prefixes=False)
    serve(cache, [*ONE, *TWO, 0])
    assert admit(cache, [*ONE, *TWO, 0]).cache_len == 0
    assert cache.num_reused_tokens == 0


def test_a_prompt_that_waits_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []

    def counting(data: bytes, *, digest_size: int) -> Any:
        hashed.append(data)
        return blake2b(data, digest_size=digest_size)

    monkeypatch.setattr(prefixes, "blake2b", counting)
    cache, seq = pool(3), sequence([*ONE, *TWO, 0])
    other = admit(cache, [7], max_tokens=8)
    for _ in range(5):
        assert not cache.fits(seq)
    cache.free(other)
    cache.allocate(seq)
    compute(cache, seq)
    assert len(hashed) == 1 + 3  # the other's salt; its salt and its full blocks


def test_a_prompt_that_runs_is_given_what_others_have_computed_by_now() -> None:
    cache = pool(16)
    first, second = admit(cache, [*ONE, *TWO, 0]), admit(cache, [*ONE, *TWO, *THREE, 1])
    table, free = cache.table(second), cache.num_free_blocks
    cache.reuse(second)
    assert (second.cache_len, cache.table(second)) == (0, table)
    assert cache.table(second) is table
    for num_blocks in (1, 2):
        advance(cache, first, SIZE)
        cache.reuse(second)
        cache.check()
        assert second.cache_len == num_blocks * SIZE
        assert cache.table(second)[:num_blocks] == cache.table(first)[:num_blocks]
        assert cache.table(second)[num_blocks:] == table[num_blocks:]
        assert cache.table(second) is not table  # so that who wrote it down sees it
        assert cache.num_free_blocks == free + num_blocks  # its own are for others
    assert (cache.num_reused_tokens, cache.num_prefix_hits, second.num_reused) == (8, 1, 8)
    compute(cache, second)
    cache.free(first)
    cache.free(second)
    cache.check()
    assert cache.num_free_blocks == 16


def test_a_prompt_that_runs_keeps_what_it_has_begun_and_a_token_to_compute() -> None:
    cache = pool(16)
    begun, whole = admit(cache, [*ONE, *TWO, 0]), admit(cache, [*ONE, *TWO])
    advance(cache, begun, 1)
    serve(cache, [*ONE, *TWO, 0])
    for seq, spared in ((begun, 0), (whole, 4)):
        cache.reuse(seq)
        cache.check()
        assert seq.num_reused == spared
    advance(cache, begun, 3)
    cache.reuse(begun)
    cache.check()
    assert (begun.cache_len, begun.num_reused) == (8, 4)


def test_blocks_that_nobody_holds_are_given_to_a_prompt_that_runs() -> None:
    cache = pool(16)
    seq = admit(cache, [*ONE, *TWO, 0])
    kept = serve(cache, [*ONE, *TWO, 1])[:2]
    cache.reuse(seq)
    cache.check()
    assert (seq.cache_len, cache.table(seq)[:2]) == (8, kept)


def test_prompts_that_compute_the_same_block_next_say_so() -> None:
    cache = pool(16)
    first, second = admit(cache, [*ONE, *TWO, 0]), admit(cache, [*ONE, *THREE, 0])
    scored, salted = admit(cache, ONE, prompt_logprobs=True), admit(cache, ONE, cache_salt="a")
    block = cache.next_block(first)
    assert block == cache.next_block(second) is not None
    assert cache.next_block(scored) is None
    assert cache.next_block(salted) not in (None, block)
    advance(cache, first, 2)
    assert cache.next_block(first) == block  # which it goes on with
    for seq, num_tokens in ((first, 2), (second, 4)):
        advance(cache, seq, num_tokens)
    assert cache.next_block(first) != cache.next_block(second)
    advance(cache, first, 4)
    assert cache.next_block(first) is None  # it doesn't fill another


def test_another_salt_has_nothing_in_common() -> None:
    cache = pool(16)
    serve(cache, [*ONE, 0], cache_salt="a")
    for salt, spared in (("b", 0), ("", 0), ("a", 4)):
        seq = admit(cache, [*ONE, 0], cache_salt=salt)
        cache.reuse(seq)
        assert seq.cache_len == spared


def test_after_a_fault_a_prompt_is_given_nothing_and_names_no_block() -> None:
    cache = pool(16)
    seq = admit(cache, [*ONE, *TWO, 0])
    serve(cache, [*ONE, *TWO, 0])
    cache.forget(seq)
    cache.reuse(seq)
    cache.check()
    assert (seq.cache_len, cache.next_block(seq)) == (0, None)


# --- eviction -----------------------------------------------------------------------------------


def test_content_is_evicted_only_when_no_blank_block_is_left() -> None:
    cache = pool(4)
    kept = serve(cache, [*ONE, 0])[0]
    other = admit(cache, [7], max_tokens=11)  # takes the other three
    assert kept not in cache.table(other)
    assert cache.fits(sequence([7]))
    assert not cache.fits(sequence([*TWO, 7]))
    assert cache.table(admit(cache, [7])) == [kept]
    cache.free(other)
    assert admit(cache, [*ONE, 0]).cache_len == 0


def test_the_least_recently_used_content_is_evicted_first() -> None:
    cache = pool(5, num_slots=3)
    for block in (ONE, TWO, THREE):
        serve(cache, [*block, 0])
    serve(cache, [*ONE, 0])  # used again
    admit(cache, [7], max_tokens=11)  # two blank blocks and the oldest content
    cache.check()
    assert admit(cache, [*ONE, 0]).cache_len == 4  # evicts THREE for its second block
    assert cache.num_free_blocks == 0


def test_a_chain_loses_its_tail_first() -> None:
    cache = pool(4)
    prompt = [*ONE, *TWO, *THREE, 0]
    serve(cache, prompt)
    for num_taken, num_shared in [(1, 12), (2, 8), (3, 4), (4, 0)]:
        other = admit(cache, [7], max_tokens=4 * num_taken - 1)
        cache.free(other)
        probe = admit(cache, [*prompt, 0])
        assert probe.cache_len == num_shared
        cache.free(probe)
        cache = pool(4)
        serve(cache, prompt)


def test_what_a_prompt_shares_is_not_evicted_for_its_own_other_blocks() -> None:
    cache = pool(3)
    kept = serve(cache, [*ONE, *TWO])[:2]
    seq = sequence([*ONE, *TWO, 0], max_tokens=3)
    assert cache.fits(seq)
    cache.allocate(seq)
    cache.check()
    assert (seq.cache_len, cache.table(seq)[:2]) == (8, kept)
    cache.free(seq)
    # Two shared blocks are free but no room for the other two, of which there is one.
    assert not cache.fits(sequence([*ONE, *TWO, 0], max_tokens=7))


# --- faults -------------------------------------------------------------------------------------


def test_after_a_fault_nothing_of_a_sequence_is_shared() -> None:
    cache = pool(16)
    first = admit(cache, [*ONE, *TWO, *THREE, 0])
    advance(cache, first, 4)
    second = admit(cache, [*ONE, *TWO, 0])
    assert second.cache_len == 4
    advance(cache, second, 4)
    third = admit(cache, [*ONE, 0])
    cache.forget(first)
    cache.check()
    assert cache.table(second)[:1] == cache.table(first)[:1]  # stays theirs
    for seq in (first, second, third):
        compute(cache, seq)
    assert admit(cache, [*ONE, *TWO, *THREE, 0]).cache_len == 0
    for seq in (first, second, third):
        cache.free(seq)
    cache.check()
    assert admit(cache, [*ONE, *TWO, *THREE, 0]).cache_len == 0


def test_what_is_computed_after_a_fault_is_not_shared_either() -> None:
    cache = pool(16)
    first = admit(cache, [*ONE, 0])
    cache.forget(first)
    compute(cache, first)
    assert admit(cache, [*ONE, 0]).cache_len == 0


def test_content_that_was_forgotten_can_be_computed_anew() -> None:
    cache = pool(16)
    first = compute(cache, admit(cache, [*ONE, 0]))
    cache.forget(first)
    second = compute(cache, admit(cache, [*ONE, 0]))
    third = admit(cache, [*ONE, 0])
    assert cache.table(third)[0] == cache.table(second)[0] != cache.table(first)[0]
    cache.forget(first)  # whose blocks aren't registered any more
    assert admit(cache, [*ONE, 0]).cache_len == 4


# --- check --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda cache, _: cache._free.append(0), "slots don't balance"),
        (lambda cache, _: cache._free.clear(), "slots don't balance"),
        (lambda _, seq: setattr(seq, "slot", None), "slot 0 is out of step"),
        (lambda _, seq: setattr(seq, "slot", 1), "slot 0 is out of step"),
        (lambda _, seq: setattr(seq, "cache_len", -1), "slot 0 is out of step"),
        (lambda _, seq: setattr(seq, "cache_len", 10), "slot 0 is out of step"),
        (lambda cache, _: setattr(cache, "max_len", 8), "slot 0 is out of step"),
        (lambda cache, seq: cache.table(seq).pop(), "holds the wrong blocks"),
        (lambda cache, seq: cache.table(seq).insert(2, cache.table(seq).pop(0)), "another's"),
        (lambda cache, seq: cache.table(seq).reverse(), "is shared before it's full"),
        (lambda cache, seq: cache.table(seq).__setitem__(1, cache.table(seq)[0]), "the wrong"),
        (lambda _, seq: setattr(seq, "cache_len", 7), "is shared before it's full"),
        (lambda cache, _: cache._counts.__setitem__(0, 2), "reference counts"),
        (lambda cache, _: cache._counts.__setitem__(5, 1), "reference counts"),
        (lambda cache, _: cache._registered.popitem(), "registrations"),
        (lambda cache, _: cache._registered.update({b"other": 0}), "registrations"),
        (lambda cache, _: cache._blank.pop(), "are idle"),
        (lambda cache, _: cache._blank.append(0), "are idle"),
        (lambda cache, _: cache._blank.append(cache._blank[0]), "are idle"),
        (lambda cache, _: cache._reusable.clear(), "are idle"),
        (lambda cache, _: cache._blank.append(cache._reusable.popitem()[0]), "are idle"),
    ],
)
def test_check_finds_what_does_not_balance(
    harm: Callable[[PagedCache, Sequence], object], message: str
) -> None:
    cache = pool(8)
    serve(cache, [*THREE, 0])
    seq = compute(cache, admit(cache, [*ONE, *TWO, 0]))
    harm(cache, seq)
    with pytest.raises(RuntimeError, match=message):
        cache.check()


def test_what_is_only_kept_for_others_is_not_in_use() -> None:
    cache = pool(num_blocks=8)
    first = compute(cache, admit(cache, [*ONE, *TWO], max_tokens=4))
    assert cache.use == 3 / 8
    second = admit(cache, [*ONE, *TWO], max_tokens=4)
    assert cache.use == 5 / 8, "a block that both hold counts once"
    for seq in (first, second):
        cache.free(seq)
    assert cache.use == 0
