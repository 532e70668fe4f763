"""The smallest model of a configuration's family, with weights that hide nothing: what `--task=check` runs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ear_jax import build
from ear_jax.config import kinds
from ear_jax.config.schema import Config
from ear_jax.config.validate import cross_faults
from ear_jax.config.values import flatten, unflatten
from ear_jax.errors import ConfigError
from ear_jax.nn.functional import Arrays, Functional, Keys, arrays_of, functional

IMAGE_PX = 16
CLASSES = 4
BATCH_SIZE = 8

_DATA = {
    "source": "shapes",
    "image_px": IMAGE_PX,
    "eval_images": 32,
    "shapes.images": 64,
    "shapes.classes": CLASSES,
    "decode_threads": 1,
}
_TOKENIZER = {
    "source": "",
    "hybrid_start_steps": 0,
    "coarse.grids": (2,),
    "coarse.codes": 8,
    "coarse.code_channels": 4,
    "fine.channels": 8,
    "fine.multipliers": (1,),
    "fine.blocks": 1,
    "vae.encoder": "custom",
    "vae.wavelet_levels": 2,
    "vae.latent_channels": 4,
    "vae.encoder_channels": 8,
    "vae.encoder_multipliers": (1,),
    "vae.encoder_blocks": 1,
    "vae.decoder_channels": 8,
    "vae.decoder_blocks": 1,
    "vae.decoder_attention": False,
    "vae.conv_groups": 1,
    "vae.conv_rank": 0,
    "kl_vae.channels": 32,
    "kl_vae.multipliers": (1, 1, 1),
    "kl_vae.blocks": 1,
    "kl_vae.latent_channels": 4,
    "vqvae.channels": 32,
    "vqvae.multipliers": (1, 1, 1),
    "vqvae.blocks": 1,
    "vqvae.latent_channels": 4,
    "vqvae.codes": 16,
    "vqvae.scales": (1, 2, 4),
    # What needs files of weights, or plays a second network, is left out.
    "loss.lpips": 0.0,
    "loss.perceptual": 0.0,
    "loss.adversarial": 0.0,
    "loss.r1": 0.0,
    "loss.lecam": 0.0,
    "loss.l1": 1.0,
}
_GENERATOR = {
    "start_from": "",
    "freeze": (),
    "patch_size": 1,
    "pyramid.scales": (),
    "pyramid.windows": (1, 2),
    "pyramid.attention_heads": 2,
    "backbone.width": 16,
    "backbone.depth": 2,
    "backbone.encoder_depth": 1,
    "backbone.heads": 2,
    "backbone.class_tokens": 2,
    "energy.width": 16,
    "energy.depth": 1,
    "energy.noise_channels": 4,
    "diffusion.width": 16,
    "diffusion.depth": 1,
    "diffusion.train_steps": 1000,
    "diffusion.sample_steps": 4,
    "coarse.steps": 2,
    "fine.steps": 2,
}
_TRAINING = {
    "batch_size": BATCH_SIZE,
    "accumulation_steps": 1,
    "epochs": 0.0,
    "steps": 4,
    "learning_rate": 1e-3,
    "reference_batch_size": 0,
    "warmup_epochs": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
    "final_phase_epochs": 0.0,
    "final_phase_steps": 0,
    "compute_dtype": "float32",
}
_SAMPLE = {"labels": (), "coarse_steps": 0, "fine_steps": 0, "batch_size": BATCH_SIZE}


def tiny_config(config: Config) -> Config:
    """Return a configuration of the same tokenizer, backbone, heads and losses with every size as small as it goes.

    Images are shapes of 16 pixels in four classes; everything runs in float32.

    Raises:
        ConfigError: the combination of tokenizer, backbone and head makes no model.
    """
    groups = {
        "data": _DATA,
        "tokenizer": _TOKENIZER | {"vae.decoder_multipliers": (1,) * _decoder_levels(config)},
        "generator": _GENERATOR,
        "tokenizer_training": _TRAINING,
        "generator_training": _TRAINING,
        "sample": _SAMPLE,
    }
    changes = {f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()}
    changes["latents.source"] = ""
    tiny = unflatten({**flatten(config), **changes})
    for level in kinds.levels(tiny):  # a kind may take one pass a level at most
        key = f"generator.{'coarse' if level.kind == 'discrete' else 'fine'}.steps"
        changes[key] = min(changes[key], kinds.kind_of(tiny).most_steps(tiny, level))
    tiny = unflatten({**flatten(config), **changes})
    if faults := cross_faults(tiny):
        raise ConfigError("; ".join(fault.text for fault in faults))
    return tiny


def random_weights(create: Callable[[Keys], Any], seed: int = 0) -> tuple[Functional, Arrays, Arrays]:
    """Return the static half of a module, random parameters, and its other arrays as the constructor makes them.

    No parameter is zero, whatever the initialiser says: what a zero stands in front of would never be seen. Matrices
    keep the scale of what runs through them.
    """
    static, shapes, others = functional(nnx.eval_shape(lambda: create(Keys(seed))))
    stream = np.random.default_rng(seed)
    parameters = {name: jnp.asarray(_drawn(name, leaf, stream), leaf.dtype) for name, leaf in shapes.items()}
    return static, parameters, jax.jit(lambda: arrays_of(create(Keys(seed)))[1])() if others else {}


def tiny_tensors(config: Config, seed: int = 0) -> Mapping[str, Mapping[str, np.ndarray]]:
    """Return random weights of tokenizer and generator as a model folder holds them."""
    static, *arrays = random_weights(lambda keys: build.build_tokenizer(config, rngs=keys), seed)
    spec = static.merge(*arrays).spec
    _, *own = random_weights(lambda keys: build.build_generator(config, spec, CLASSES, rngs=keys), seed + 1)
    parts = {"tokenizer": arrays[0] | arrays[1], "generator": own[0] | own[1]}
    return {part: {name: np.asarray(leaf) for name, leaf in named.items()} for part, named in parts.items()}


def _decoder_levels(config: Config) -> int:
    return _TOKENIZER["vae.wavelet_levels"] + (config.tokenizer.vae.decoder_output == "image")


def _drawn(name: str, leaf: jax.ShapeDtypeStruct, stream: np.random.Generator) -> np.ndarray:
    normal = stream.normal(size=leaf.shape)
    if name.endswith("scale"):
        return 1.0 + 0.1 * normal
    if len(leaf.shape) < 2 or name.endswith("bias"):
        return 0.1 * normal
    return normal / math.sqrt(math.prod(leaf.shape[:-1]))
