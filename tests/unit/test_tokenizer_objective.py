"""Training of tokenizers: one batch is learned, stages switch in one program, codebooks move, terms are logged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tokenizers import compiled, pictures, tiny_hybrid, tiny_vae, train_step

from ear_jax.nn.functional import Keys
from ear_jax.tokenizers import objective as objectives
from ear_jax.tokenizers.objective import TokenizerObjective

START = 60


def _objective(keys: Keys) -> TokenizerObjective:
    return TokenizerObjective(
        tiny_hybrid(keys),
        l1=1.0,
        l2=0.5,
        wavelet=0.1,
        gaussian=0.1,
        kl=1e-5,
        commitment=0.25,
        hybrid_start_steps=START,
        coarse_only_probability=0.5,
        rngs=keys,
    )


@pytest.fixture(scope="module")
def hybrid_run() -> dict[str, Any]:
    """A hybrid tokenizer trained on one batch: VAE first, then hybrid; the metrics of every step."""
    parameters, rest, optimizer_state, step = train_step(compiled(lambda: _objective(Keys(0))))
    history, first_gradients, before = [], {}, {}
    for number in range(3 * START):
        if number in (0, START):
            before[number] = rest
        parameters, rest, optimizer_state, metrics, gradients = step(
            parameters, rest, optimizer_state, pictures(32), jnp.int32(number)
        )
        if number in (0, START):
            first_gradients[number] = gradients
        history.append({name: float(value) for name, value in metrics.items()})
    return dict(history=history, gradients=first_gradients, before=before, rest=rest, programs=step._cache_size())


def test_one_batch_is_learned_by_the_vae_and_kept_by_the_hybrid(hybrid_run: dict[str, Any]):
    history = hybrid_run["history"]
    vae = np.mean([metrics["psnr"] for metrics in history[START - 5 : START]])
    hybrid = np.mean([metrics["psnr"] for metrics in history[-10:]])
    coarse = np.mean([metrics["psnr_coarse"] for metrics in history[-10:]])
    coarse_at_start = np.mean([metrics["psnr_coarse"] for metrics in history[START : START + 5]])
    assert vae > history[0]["psnr"] + 10.0
    assert hybrid > vae - 1.0
    assert coarse > coarse_at_start + 3.0
    assert hybrid > coarse + 0.5, "fine tokens add detail"


def test_hybrid_path_starts_where_the_vae_stood(hybrid_run: dict[str, Any]):
    history = hybrid_run["history"]
    assert abs(history[START]["psnr"] - history[START - 1]["psnr"]) < 2.0


def test_stages_are_one_program(hybrid_run: dict[str, Any]):
    assert hybrid_run["programs"] == 1


def test_every_term_is_logged_and_finite_and_makes_up_the_loss(hybrid_run: dict[str, Any]):
    weights = {"l1": 1.0, "l2": 0.5, "wavelet": 0.1, "gaussian": 0.1, "kl": 1e-5, "commitment": 0.25}
    for metrics in (hybrid_run["history"][0], hybrid_run["history"][-1]):
        assert all(np.isfinite(value) for value in metrics.values())
        assert {name for name in metrics if name.startswith("loss/")} == {f"loss/{name}" for name in weights}
        total = sum(weight * metrics[f"loss/{name}"] for name, weight in weights.items())
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)


def test_codebook_rests_in_the_vae_stage_starts_once_and_is_used(hybrid_run: dict[str, Any]):
    codes = "tokenizer/coarse/levels/0/book/codes"
    np.testing.assert_array_equal(hybrid_run["before"][START][codes], hybrid_run["before"][0][codes])
    assert not np.array_equal(hybrid_run["rest"][codes], hybrid_run["before"][START][codes])
    assert int(hybrid_run["rest"]["tokenizer/coarse/levels/0/book/started"]) == 1
    last = hybrid_run["history"][-1]
    assert last["codebook/usage"] > 0.5
    assert last["codebook/perplexity"] > 5.0


def test_gradients_are_finite_and_reach_the_coarse_branch_only_when_it_runs(hybrid_run: dict[str, Any]):
    def size(stage: int, part: str) -> float:
        leaves = [value for name, value in hybrid_run["gradients"][stage].items() if part in name]
        assert leaves and all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
        return float(sum(jnp.abs(leaf).sum() for leaf in leaves))

    assert size(0, "/coarse/") == 0.0
    assert size(START, "/coarse/") > 0.0
    assert size(START, "/fine/") > 0.0
    assert size(START, "/encoder/") > 0.0


@pytest.fixture(scope="module")
def measured() -> Callable[..., dict[str, float]]:
    """One evaluation of a fresh objective with the given settings: its metrics."""

    def measure(build: Callable[[Keys], Any], **settings: Any) -> dict[str, float]:
        def evaluate(images: jax.Array) -> dict[str, jax.Array]:
            keys = Keys(0)
            objective = TokenizerObjective(build(keys), **settings, rngs=keys)
            value, metrics = objective.loss({"image": images}, jax.random.key(0), jnp.int32(0), {})
            return {**metrics, "loss": value}

        return {name: float(value) for name, value in jax.jit(evaluate)(pictures(8)).items()}

    return measure


def test_terms_of_weight_zero_are_absent(measured: Callable[..., dict[str, float]]):
    metrics = measured(tiny_vae, l1=1.0)
    assert set(metrics) == {"loss", "loss/l1", "psnr"}
    assert metrics["loss"] == metrics["loss/l1"]


def test_the_perceptual_term_joins_by_its_weight_and_at_zero_no_network_is_made(
    measured: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch
):
    made = []

    def network() -> Callable[[jax.Array, jax.Array], jax.Array]:
        made.append(1)
        return lambda images, originals: jnp.abs(images - originals).max(axis=(1, 2, 3))

    monkeypatch.setitem(objectives.FEATURE_DISTANCES, "efficientnet_lite0", network)
    without = measured(tiny_vae, l1=1.0)
    assert measured(tiny_vae, l1=1.0, perceptual=0.0) == without and not made, "bit for bit"
    metrics = measured(tiny_vae, l1=1.0, perceptual=0.5)
    assert made == [1] and metrics["loss/l1"] == without["loss/l1"]
    np.testing.assert_allclose(metrics["loss"], without["loss"] + 0.5 * metrics["loss/perceptual"], rtol=1e-6)


@pytest.mark.parametrize(("probability", "absent"), [(0.0, "psnr_coarse"), (1.0, "psnr")])
def test_fine_branch_is_dropped_with_the_given_probability(
    measured: Callable[..., dict[str, float]], probability: float, absent: str
):
    def build(keys: Keys) -> Any:
        return tiny_hybrid(keys, grids=(2, 4), initialisation="data")

    metrics = measured(build, l1=1.0, hybrid_start_steps=0, coarse_only_probability=probability)
    assert metrics[absent] == 0.0
    assert metrics["psnr" if absent == "psnr_coarse" else "psnr_coarse"] > 0.0
    assert {"codebook/usage_2", "codebook/perplexity_4"} <= set(metrics), "each grid of a pyramid is logged"
