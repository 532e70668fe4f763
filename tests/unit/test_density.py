"""Sampling by density: which of several draws is kept, and that an image still depends on its own key alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module

from ear_jax.heads.density import by_density, densest
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.joint import JointEnergyHead

SIZES: dict[str, Any] = dict(hidden_width=8, channels=3, width=16, depth=1, noise_channels=4)


def test_the_densest_fraction_is_kept_each_draw_of_it_equally_likely():
    """Two modes of 5 and 3 draws, more and less narrow, and how `chance` walks through them from the densest on."""
    close, wide, units = [0.0, 0.1, 0.2, 0.3], [9.0, 10.0, 11.0], 4000
    candidates = np.broadcast_to(np.asarray([*wide, *close, 50.0])[:, None, None], (8, units, 1)).astype(np.float32)
    chance = (np.arange(units, dtype=np.float32) + 0.5) / units
    kept = jax.jit(lambda keep: densest(jnp.asarray(candidates), jnp.asarray(chance), keep))

    def shares(keep: float) -> np.ndarray:
        return np.bincount(kept(np.float32(keep)), minlength=8) / units

    np.testing.assert_allclose(shares(1.0), 1 / 8, atol=1e-3)
    assert shares(7 / 8)[-1] == 0, "what lies alone goes first"
    np.testing.assert_allclose(shares(0.5), [0, 0, 0, *[0.25] * 4, 0], atol=1e-3)
    assert sorted(shares(0.01))[-2:] == [0, 1], "the densest is always left"
    between = sorted(shares(2.4 / 8), reverse=True)[:3]
    np.testing.assert_allclose(between, [1 / 2.4, 1 / 2.4, 0.4 / 2.4], atol=1e-3, err_msg="no jumps between fractions")


def test_draws_of_heavy_tails_are_as_they_were_at_1_and_narrower_below():
    draws = jax.random.t(jax.random.key(0), 3.0, (8, 20_000, 2))
    chance = jax.random.uniform(jax.random.key(1), (20_000,))
    kept = jax.jit(lambda keep: jnp.take_along_axis(draws, densest(draws, chance, keep)[None, :, None], axis=0)[0])
    width = lambda values: float(jnp.abs(values).mean())  # noqa: E731
    plain, *narrower = (width(kept(np.float32(keep))) for keep in (1.0, 0.5, 0.25))
    assert abs(plain / width(draws) - 1) < 0.02
    assert plain > 1.2 * narrower[0] > 1.2 * narrower[1]


@pytest.mark.parametrize("is_joint", [False, True], ids=["token", "joint"])
def test_a_token_or_a_whole_grid_is_one_candidate_and_an_image_uses_its_own_key_alone(is_joint):
    more: dict[str, Any] = dict(windows=(1,), attention_heads=2) if is_joint else {}
    head = random_module(lambda rngs: (JointEnergyHead if is_joint else EnergyHead)(**SIZES, **more, rngs=rngs))
    hidden, keys_B = jax.random.normal(jax.random.key(0), (3, 4, 8)), jax.random.split(jax.random.key(1), 3)

    def drawn(hidden: jax.Array, keys_B: jax.Array, keep: Any) -> Any:
        dense = by_density(head, 5, keep)
        numbered = lambda i: jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B)  # noqa: E731
        one_of = [head.sample(head.predict(hidden), numbered(i), 0.9) for i in range(5)]
        return dense.sample(dense.predict(hidden), keys_B, 0.9), jnp.stack(one_of)

    draw = jax.jit(drawn)
    kept, candidates = draw(hidden, keys_B, np.float32(0.5))
    is_candidate = np.isclose(candidates, kept, atol=1e-5).all(-1)
    assert is_candidate.any(0).all() and not is_candidate.all(0).any()
    assert not is_joint or is_candidate.all(-1).any(0).all(), "a grid is kept whole"
    assert len(np.unique(is_candidate.argmax(0))) > 1
    again, _ = draw(hidden[::-1], keys_B[::-1], np.float32(0.5))
    np.testing.assert_allclose(again[::-1], kept, atol=1e-5)


def test_one_draw_and_heads_of_another_kind_are_left_as_they_are():
    head, other = EnergyHead(**SIZES, rngs=nnx.Rngs(0)), object()
    assert by_density(head, 1, 0.5) is head and by_density(other, 8, 0.5) is other
    assert by_density(head, 3, 0.5).guides == head.guides
