import pytest

from wanlora.core.buckets import Bucket, latent_shape, num_tokens, problem_with, usual


def test_the_full_size_clip_has_the_published_latents_and_tokens():
    assert latent_shape(Bucket(81, 480, 832)) == (16, 21, 60, 104)
    assert num_tokens(Bucket(81, 480, 832)) == 32760


@pytest.mark.parametrize(
    ("bucket", "says"),
    [
        (Bucket(80, 480, 832), "use 77 or 81"),
        (Bucket(0, 480, 832), "use 1 or 5"),
        (Bucket(81, 481, 832), "height 481 px; expected a multiple of 16: use 480 or 496"),
        (Bucket(81, 480, 8), "use 16 or 32"),
    ],
)
def test_sizes_the_vae_would_cut_silently_are_refused_with_the_nearest_ones(bucket, says):
    assert says in (problem_with(bucket) or "")
    assert problem_with(Bucket(81, 480, 832)) is None


def test_the_usual_size_is_that_of_stills_only_where_nothing_moves():
    still, short, long = (Bucket(frames, 480, 832) for frames in (1, 17, 81))
    assert usual([still, still, still, short, long, long]) == long
    assert usual([still]) == still
