import numpy as np
from scipy import stats

from wanlora.core.rng import Stream, generator, normal, uniform


def test_a_draw_depends_on_its_coordinates_only():
    first = normal(7, Stream.NOISE, 3, 5, (16, 2, 4, 4))
    normal(7, Stream.NOISE, 0, 0, (1000,))
    np.random.default_rng().normal()
    np.testing.assert_array_equal(first, normal(7, Stream.NOISE, 3, 5, (16, 2, 4, 4)))


def test_neighbours_in_every_coordinate_are_unrelated():
    base = normal(7, Stream.NOISE, 3, 5, (20000,))
    for other in (
        normal(8, Stream.NOISE, 3, 5, (20000,)),
        normal(7, Stream.VALIDATION, 3, 5, (20000,)),
        normal(7, Stream.NOISE, 4, 5, (20000,)),
        normal(7, Stream.NOISE, 3, 6, (20000,)),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


def test_noise_is_standard_normal_float32():
    draws = normal(1, Stream.NOISE, 0, 0, (20000,))
    assert draws.dtype == np.float32
    assert stats.kstest(draws, "norm").pvalue > 1e-3


def test_the_counter_is_the_documented_one():
    """Philox key (seed, stream), counter (0, 0, step, slot): what a checkpoint relies on."""
    expected = np.random.Generator(np.random.Philox(key=[9, 1], counter=[0, 0, 11, 2]))
    assert generator(9, Stream.SIGMA, 11, 2).random() == expected.random()
    assert 0 < uniform(9, Stream.SIGMA, 11, 2) < 1
