"""The smallest tokenizers that have every part, built by one compiled program each, and a train step for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ear_jax.nn.functional import Arrays, Keys, arrays_of, functional
from ear_jax.tokenizers.lite_hybrid import LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.objective import TokenizerObjective

IMAGE_PX = 16
LATENT_GRID = 8
LATENT_CHANNELS = 4


def tiny_vae(keys: Keys, **overrides: Any) -> LiteVAE:
    """Build a VAE of 16 px images with an 8 x 8 x 4 latent."""
    sizes = dict(
        image_px=IMAGE_PX,
        encoder="custom",
        wavelet_levels=1,
        latent_channels=LATENT_CHANNELS,
        encoder_channels=8,
        encoder_multipliers=(1,),
        encoder_blocks=1,
        decoder_channels=16,
        decoder_multipliers=(1,),
        decoder_blocks=1,
        decoder_attention=False,
        decoder_norm="group",
        conv_groups=1,
        conv_rank=0,
        decoder_output="wavelet",
    )
    return LiteVAE(**{**sizes, **overrides}, rngs=keys)


def tiny_hybrid(keys: Keys, **overrides: Any) -> LiteHybrid:
    """Build a Lite-Hybrid on the tiny VAE: one coarse grid of 4 with 32 codes."""
    sizes = dict(
        grids=(4,),
        codes=32,
        code_channels=4,
        initialisation="kmeans",
        decay=0.9,
        revive_below=0.03,
        fine_channels=8,
        fine_multipliers=(1, 1),
        fine_blocks=1,
        fusion="mlp",
    )
    return LiteHybrid(vae=tiny_vae(keys), **{**sizes, **overrides}, rngs=keys)


def parameter_count(module: nnx.Module) -> int:
    """Count the trained parameters of a module, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def compiled(create: Callable[[], Any]) -> Any:
    """Run a constructor as one compiled program instead of one program an array."""
    static, _, _ = functional(nnx.eval_shape(create))
    return static.merge(*jax.jit(lambda: arrays_of(create()))())


def train_step(objective: TokenizerObjective, learning_rate: float = 1e-2) -> tuple[Arrays, Arrays, Any, Callable]:
    """Return parameters, other arrays, optimiser state and a compiled step (params, rest, opt, images, step)."""
    static, parameters, rest = functional(objective)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))

    @jax.jit
    def step(parameters: Arrays, rest: Arrays, optimizer_state: Any, images: jax.Array, number: jax.Array) -> Any:
        def loss(parameters: Arrays) -> Any:
            module = static.merge(parameters, rest)
            rng = jax.random.fold_in(jax.random.key(0), number)
            value, metrics = module.loss({"image": images}, rng, number, {})
            return value, (metrics, arrays_of(module)[1])

        (value, (metrics, moved)), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), moved, state, {**metrics, "loss": value}, gradients

    return parameters, rest, optimizer.init(parameters), step


def pictures(count: int, seed: int = 0) -> jax.Array:
    """Return random pictures of one bright square on a dark ground, uint8."""
    corner = jax.random.randint(jax.random.key(seed), (count, 2), 0, IMAGE_PX // 2)
    color = jax.random.randint(jax.random.key(seed + 1), (count, 1, 1, 3), 100, 255)
    line = jnp.arange(IMAGE_PX)
    rows = (line[None] >= corner[:, :1]) & (line[None] < corner[:, :1] + 6)
    columns = (line[None] >= corner[:, 1:]) & (line[None] < corner[:, 1:] + 6)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, color, 20).astype(jnp.uint8)
