"""Counting tokens without downloading anything."""

from wanlora.core.buckets import MAX_TOKENS
from wanlora.wan import tokens


def test_a_model_that_is_not_here_gives_an_estimate_marked_as_one():
    found = tokens.count_tokens("nobody/no-such-model", ["a person walks", "a person walks", ""])
    assert found.tokenizer is None
    assert found.counts == {"a person walks": 5, "": 1}


def test_a_name_that_is_no_model_gives_an_estimate_too():
    assert tokens.count_tokens("no model / at all", ["x"]).tokenizer is None


def test_scripts_without_spaces_are_counted_by_character():
    assert tokens.estimate("一个人在街上走路") == round(8 * 0.7) + 1
    assert tokens.estimate("word " * 600) > MAX_TOKENS
