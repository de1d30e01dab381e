"""Keys that tell steering apart, and an index that never gives a place twice nor forgets the wrong block first."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native.block_index import BlockIndex, chain
from server.engine.native.sequence import SteeringState

SIZE = 4
tokens = st.lists(st.integers(0, 2), max_size=30)
salts = st.binary(min_size=1, max_size=4)
# Prompts as chains of keys; few symbols, so that they share beginnings.
prompts = st.lists(st.integers(0, 1), max_size=6).map(lambda path: [bytes(path[: i + 1]) for i in range(len(path))])


def common(a, b):
    """How many items two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(tokens, tokens)
def test_keys_are_equal_as_far_as_the_tokens_are(a, b):
    first, second = chain(a, SIZE), chain(b, SIZE)
    assert len(first) == len(a) // SIZE
    assert common(first, second) == common(a, b) // SIZE
    assert not set(first[common(first, second) :]) & set(second)  # and after the first difference never again
    assert len(set(first)) == len(first)  # equal blocks at different places are different blocks


def test_a_token_id_is_a_number_not_a_byte():
    assert chain([1, 0, 0, 0], 4) != chain([257, 0, 0, 0], 4)
    assert chain([1, 256, 0, 0], 4) != chain([1, 0, 1, 0], 4)
    assert len(chain([150_000, 2**31, 2**40, 0], 4)) == 1


@given(tokens, salts, st.integers(0, 30))
def test_a_salt_changes_the_keys_from_its_position_on_and_no_others(ids, salt, salted_from):
    plain, salted = chain(ids, SIZE), chain(ids, SIZE, salt, salted_from)
    assert common(plain, salted) == min(salted_from // SIZE, len(plain))
    assert not set(salted[salted_from // SIZE :]) & set(plain)


@given(tokens, tokens, salts, salts, st.integers(0, 30), st.integers(0, 30))
def test_what_was_steered_otherwise_has_other_keys(a, b, first, second, first_from, second_from):
    """A key stands for its tokens and, block by block from the first one, for what steered them."""

    def meaning(ids, salt, start, block):
        stop = (block + 1) * SIZE
        return tuple(ids[:stop]), tuple(salt if (i + 1) * SIZE > start else b"" for i in range(block + 1))

    for i, key in enumerate(chain(a, SIZE, first, first_from)):
        for j, other in enumerate(chain(b, SIZE, second, second_from)):
            assert (key == other) == (meaning(a, first, first_from, i) == meaning(b, second, second_from, j))


class Doses:
    """Stand-ins for `steering.intervention.Dose`."""

    def __init__(self, key, prompt=True, uniform=True):
        self.key, self.prompt, self.uniform = key, prompt or None, uniform


def keys_of(dose_list, num_prompt_tokens, segment, ids):
    state = SteeringState(num_prompt_tokens, dose_list)
    return chain(ids, SIZE, *state.salt(segment))


def test_the_salt_of_a_segment_knows_the_sites_below_it_only():
    a, b = Doses(b"a"), Doses(b"b")
    ids = list(range(20))
    assert keys_of([a, b], 20, 0, ids) == chain(ids, SIZE)
    assert keys_of([a, b], 20, 1, ids) == keys_of([a], 20, 1, ids) != keys_of([b], 20, 1, ids)
    assert keys_of([None, None], 20, 2, ids) == chain(ids, SIZE)
    seen = [tuple(keys_of(d, 20, 2, ids)) for d in ([a, None], [None, a], [a, a], [b, a], [a, b], [None, None])]
    assert len(set(seen)) == 6  # the same vector at another site is another salt


def test_a_vector_for_the_answer_leaves_the_prompts_blocks_to_everyone():
    ids = list(range(20))
    last = Doses(b"a", prompt=False, uniform=False)
    assert common(keys_of([last], 17, 1, ids), chain(ids, SIZE)) == 4  # position 16 is steered, 15 is not
    assert common(keys_of([last], 16, 1, ids), chain(ids, SIZE)) == 3
    assert common(keys_of([Doses(b"a", uniform=False)], 17, 1, ids), chain(ids, SIZE)) == 0


def test_where_the_prompt_ends_matters_unless_every_position_gets_the_same():
    ids = list(range(20))
    for dose, same in ((Doses(b"a"), True), (Doses(b"a", uniform=False), False), (Doses(b"a", None, False), False)):
        assert (keys_of([dose], 9, 1, ids)[-1] == keys_of([dose], 10, 1, ids)[-1]) == same


@settings(max_examples=300)
@given(st.integers(0, 8), st.lists(st.tuples(st.booleans(), prompts), max_size=30))
def test_places_are_unique_and_a_match_is_the_longest_cached_prefix(num_blocks, actions):
    index = BlockIndex(num_blocks)
    stored: dict[bytes, int] = {}  # what each place was last filled with, by key
    for insert, keys in actions:
        if insert:
            known = {key for key in keys if index.match([key])}
            added = index.insert(keys)
            numbers = [number for number, _ in added]
            assert numbers == sorted(numbers)
            assert not {keys[number] for number in numbers} & known  # what is there is not stored again
            for number, place in added:
                for key in [key for key, taken in stored.items() if taken == place]:
                    del stored[key]  # the place changes hands
                stored[keys[number]] = place
        places = index.match(keys)
        kept = [stored.get(key) for key in keys]
        longest = kept.index(None) if None in kept else len(kept)
        assert places == kept[:longest]
        assert len(index) == len(stored) == len(set(stored.values())) <= num_blocks
        assert all(0 <= place < num_blocks for place in stored.values())


@settings(max_examples=300)
@given(st.integers(0, 8), st.lists(prompts, max_size=10), prompts)
def test_a_prompt_evicts_the_least_recently_used_and_never_its_own_blocks(num_blocks, earlier, keys):
    index = BlockIndex(num_blocks)
    age: OrderedDict[bytes, None] = OrderedDict()  # least recently used first; by whole prompts, last block first
    for other in (*earlier, keys):
        before = [key for key in age if key in index._places and key not in other]
        index.insert(other)
        for key in reversed(other):
            if key in index._places:
                age[key] = None
                age.move_to_end(key)
        gone = [key for key in before if key not in index._places]
        assert gone == before[: len(gone)], "those of others that were used longest ago"
        kept = [key in index._places for key in other]
        assert kept == [i < num_blocks for i in range(len(other))], "only what does not fit at its end is left out"
        assert list(index._places) == [key for key in age if key in index._places]


def test_a_match_keeps_a_prompt_from_being_forgotten():
    index = BlockIndex(4)
    index.insert([b"a", b"ab"])
    index.insert([b"x", b"xy"])
    assert len(index.match([b"a", b"ab"])) == 2
    assert index.match([b"b", b"ab"]) == []
    index.insert([b"p"])
    assert index.match([b"x", b"xy"]) != [] and len(index.match([b"x", b"xy"])) == 1  # its last block went first
    assert len(index.match([b"a", b"ab"])) == 2
