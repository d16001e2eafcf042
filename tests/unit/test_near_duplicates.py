"""Captions that say nearly the same."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from wanlora.data.near_duplicates import similar_pairs, words


def test_case_order_and_punctuation_do_not_count():
    found = similar_pairs(["A man walks.", "walks, a MAN", "a dog sleeps"])
    assert found == ([(0, 1, 1.0)], True)


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
    found = similar_pairs(texts, threshold=threshold)
    assert ({(i, j) for i, j, _ in found.pairs}, found.complete) == (expected, True)


def test_captions_made_from_a_template_stop_the_search_instead_of_filling_the_memory():
    template = "a video of a person who walks past {} in the soft warm light of a long summer day"
    alike = [template.format(f"house {number}") for number in range(20_000)]
    found = similar_pairs(alike)
    assert (len(found.pairs), found.complete) == (1000, False)
    assert similar_pairs(alike[:45]).complete  # 990 pairs


def test_captions_that_share_words_without_being_alike_stop_the_search_too():
    texts = [f"a person in the light of {number}" for number in range(2000)]  # 6 words of 8
    assert similar_pairs(texts, max_comparisons=10_000) == ([], False)
    assert similar_pairs(texts[:100], max_comparisons=10_000) == ([], True)
