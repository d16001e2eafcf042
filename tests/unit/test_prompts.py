import pytest

from wanlora.core.prompts import PromptAssignment, assign_prompts, slug


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A dog, running!", "a-dog-running"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "empty"),
        ("跑步 的 人", "跑步-的-人"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-wor"),
    ],
)
def test_a_prompt_becomes_a_harmless_file_name(prompt, expected):
    assert slug(prompt) == expected


def test_few_captions_are_taken_again_with_other_seeds_and_many_are_thinned_evenly():
    assert assign_prompts({"sit": ["a"], "clap": ["b", "c"]}, 3, seed=5) == [
        PromptAssignment("clap", "b", 5),
        PromptAssignment("clap", "c", 6),
        PromptAssignment("clap", "b", 7),
        PromptAssignment("sit", "a", 5),
        PromptAssignment("sit", "a", 6),
        PromptAssignment("sit", "a", 7),
    ]
    many = assign_prompts({"walk": [str(index) for index in range(10)]}, 4, seed=0)
    assert [item.prompt for item in many] == ["0", "2", "5", "7"]
