import numpy as np

from wanlora.store.latent_rgb import normal_equations, solve, to_rgb


def _clip(rng, projection, frames=9, height=4, width=6):
    """Latents and the frames that a linear map of them paints."""
    latents = rng.standard_normal((3, 1 + (frames - 1) // 4, height, width)).astype(np.float32)
    small = to_rgb(latents, projection)
    full = small.repeat(8, axis=1).repeat(8, axis=2)
    return latents, np.concatenate([full[:1], full[1:].repeat(4, axis=0)])


def test_the_fit_finds_the_linear_map_that_painted_the_frames():
    rng = np.random.default_rng(0)
    truth = np.vstack([0.08 * rng.standard_normal((3, 3)), [[0.5, 0.4, 0.6]]])
    parts = [normal_equations(*_clip(rng, truth)) for _ in range(3)]
    found = solve(sum(gram for gram, _ in parts), sum(cross for _, cross in parts))
    np.testing.assert_allclose(found, truth, atol=2e-3)


def test_sums_of_parts_equal_the_whole():
    rng = np.random.default_rng(1)
    projection = np.full((4, 3), 0.1)
    latents, frames = _clip(rng, projection, height=8)
    whole = normal_equations(latents, frames)
    halves = [
        normal_equations(latents[:, :, rows], frames[:, pixels])
        for rows, pixels in ((slice(0, 4), slice(0, 32)), (slice(4, 8), slice(32, 64)))
    ]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], whole[0], rtol=1e-9)
    np.testing.assert_allclose(halves[0][1] + halves[1][1], whole[1], rtol=1e-6)
