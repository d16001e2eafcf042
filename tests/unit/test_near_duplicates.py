"""Captions that say nearly the same."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from wanlora.core.near_duplicates import similar_pairs, words


def test_case_order_and_punctuation_do_not_count():
    assert similar_pairs(["A man walks.", "walks, a MAN", "a dog sleeps"]) == [(0, 1, 1.0)]


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join), max_size=12),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_every_similar_pair_is_found_and_no_other(texts, threshold):
    def similarity(a, b):
        return len(words(a) & words(b)) / len(words(a) | words(b)) if words(a) | words(b) else 0

    expected = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if similarity(texts[i], texts[j]) >= threshold
    }
    assert {(i, j) for i, j, _ in similar_pairs(texts, threshold=threshold)} == expected
