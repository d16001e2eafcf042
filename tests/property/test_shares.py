"""Ranks that see nothing but what is committed: whoever survives, every row is made."""

from hypothesis import given, settings
from hypothesis import strategies as st

from wanlora.commands.cache_latents.claims import claim_chunks
from wanlora.processes.ranks import Rank, share


class Keys(frozenset):
    """Committed rows, as `claim_chunks` reads them."""

    def present(self, keys):
        return self & set(keys)


def simulate(num_rows: int, world: int, most: int, order: list[int], deaths: dict[int, int]):
    """Let ranks encode and commit a chunk each, in an order; the copies made of every row.

    A rank dies before it commits its n-th chunk. One that is in the order less often is slower.
    """
    missing = {f"row {i}": i % 3 for i in range(num_rows)}
    copies = dict.fromkeys(missing, 0)
    told = [0] * world

    def rank(index: int):
        def tell(rows: int) -> None:
            told[index] += rows

        chunks = claim_chunks(
            dict(sorted(missing.items(), key=lambda item: item[1])),
            Rank(index, world), lambda: Keys(key for key, n in copies.items() if n),
            max_rows=most, group_of=lambda bucket: bucket, on_committed=tell,
        )  # fmt: skip
        for number, chunk in enumerate(chunks):
            assert 1 <= len(chunk) <= most
            assert len(set(chunk.values())) == 1
            yield
            if deaths.get(index) == number:
                return
            told[index] += len(chunk)
            for key in chunk:
                copies[key] += 1

    running = {index: rank(index) for index in range(world)}
    while running:
        for index in [*order, *running]:
            if index in running and next(running[index], "ended") == "ended":
                del running[index]
    return copies, told


worlds = st.integers(1, 6).flatmap(
    lambda world: st.tuples(
        st.just(world),
        st.lists(st.integers(0, world - 1), max_size=12),
        st.dictionaries(st.integers(0, world - 1), st.integers(0, 6), max_size=world - 1),
    )
)


@settings(deadline=None, max_examples=150)
@given(num_rows=st.integers(1, 120), most=st.integers(1, 9), world=worlds)
def test_any_surviving_ranks_make_every_row_and_know_it(num_rows, most, world):
    num_ranks, order, deaths = world
    copies, told = simulate(num_rows, num_ranks, most, order, deaths)
    assert min(copies.values()) >= 1
    assert all(told[index] == num_rows for index in range(num_ranks) if index not in deaths)


@given(num_rows=st.integers(1, 200), world=st.integers(1, 12), most=st.integers(1, 32))
def test_ranks_that_see_the_same_choose_apart(num_rows, world, most):
    left = list(range(num_rows))
    shares = [share(left, Rank(index, world), most=most) for index in range(world)]
    assert all(shares)
    if num_rows >= world:
        taken = [row for each in shares for row in each]
        assert len(taken) == len(set(taken))


def test_ranks_of_one_speed_repeat_little_and_a_dead_one_costs_little_more():
    for deaths in ({}, {1: 10}):
        copies, _ = simulate(2000, 8, 32, [], deaths)
        assert sum(copies.values()) - 2000 < 0.05 * 2000
