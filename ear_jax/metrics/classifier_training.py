"""How the judging classifier is trained: on real images with noise, blur and block noise, and what it sees through.

Trained on clean images alone it would judge small artefacts of tokenizers and samplers instead of content.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from ear_jax.metrics.classifier import Classifier, accuracy, to_float
from ear_jax.types import Batch

_LABEL_SMOOTHING = 0.05
_PEAK_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 0.02
_LOG_EVERY_STEPS = 100
_NOISE_STD = 0.4
_BLOCK_STD = 0.4
_BLUR_PASSES = 4

Images = Float[Array, "B h w c"]
Amount = Float[Array, " B"]


def train_classifier(
    batches: Iterator[Batch],
    classes: int,
    *,
    steps: int,
    channels: int,
    seed: int,
    image_px: int,
    use_flip: bool = True,
    log: Callable[[str], None] | None = None,
) -> Classifier:
    """Train a classifier on degraded real images and return it.

    Args:
        batches: Endless training batches: `image` uint8 [B,h,w,3], `label` int [B]; equal batch sizes.
        classes: Number of classes.
        steps: Updates.
        channels: At the first grid; 16 does for shapes, 48 or more for photographs.
        seed: Of the initial weights, flips and degradations.
        image_px: At least 16.
        use_flip: Mirror half of the images; switch it off where left and right are classes.
        log: Takes a line of progress now and then.
    """
    abstract = nnx.eval_shape(lambda: Classifier(classes=classes, channels=channels, image_px=image_px))
    graph, shapes = nnx.split(abstract, nnx.Param)
    optimizer, update = _make_update(graph, classes, use_flip)
    params = _initial(shapes, seed)
    opt_state, root = optimizer.init(params), jax.random.key(seed)
    warmup = max(1, min(50, steps // 5))
    schedule = optax.warmup_cosine_decay_schedule(0.0, _PEAK_LEARNING_RATE, warmup, max(steps, warmup + 1))
    for step in range(1, steps + 1):
        batch, rng = next(batches), jax.random.fold_in(root, step)
        rate = np.asarray(schedule(step), np.float32)
        params, opt_state, loss, right = update(params, opt_state, batch["image"], batch["label"], rng, rate)
        if log is not None and (step % _LOG_EVERY_STEPS == 0 or step == steps):
            log(f"classifier step {step}/{steps}  loss {float(loss):.3f}  accuracy on degraded {float(right):.3f}")
    return nnx.merge(graph, params)


def accuracy_when_degraded(
    classifier: Classifier, images: UInt8[np.ndarray, "B h w 3"], labels: Int[np.ndarray, " B"], *, seed: int = 0
) -> dict[str, float]:
    """Return the accuracy on held-out images, clean and under each degradation at half strength.

    An accuracy of samples can only be trusted as far as these are high.
    """
    result = {"accuracy_clean": accuracy(classifier, images, labels)}
    floats, half = to_float(jnp.asarray(images)), jnp.full(len(images), 0.5)
    for name, function in DEGRADATIONS.items():
        worse = jnp.clip(jax.jit(function)(floats, jax.random.key(seed), half), -1.0, 1.0)
        result[f"accuracy_{name}"] = accuracy(classifier, worse, labels)
    return result


def noise(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Add Gaussian noise of standard deviation 0.4 x amount to each image in [-1, 1]."""
    return images + _NOISE_STD * _each(amount) * jax.random.normal(rng, images.shape, jnp.float32)


def blur(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Blur each image by up to four binomial 1-2-1 passes, about 1.4 pixels of standard deviation at amount 1."""
    del rng
    for done in range(_BLUR_PASSES):
        share = _each(jnp.clip(amount * _BLUR_PASSES - done, 0.0, 1.0))
        images = images + share * (_binomial(_binomial(images, 1), 2) - images)
    return images


def block_noise(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Add noise that is constant over squares of an eighth of the side, of standard deviation 0.4 x amount."""
    count, height, width, channels = images.shape
    block = max(2, min(height, width) // 8)
    coarse = jax.random.normal(rng, (count, -(-height // block), -(-width // block), channels), jnp.float32)
    squares = jnp.repeat(jnp.repeat(coarse, block, axis=1), block, axis=2)[:, :height, :width]
    return images + _BLOCK_STD * _each(amount) * squares


DEGRADATIONS: dict[str, Callable[[Images, Key[Array, ""], Amount], Images]] = {
    "noise": noise,
    "blur": blur,
    "block_noise": block_noise,
}


def flip_some(images: Images, rng: Key[Array, ""]) -> Images:
    """Mirror each image left-right with probability one half."""
    chosen = jax.random.bernoulli(rng, jnp.float32(0.5), (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def degrade(images: Images, rng: Key[Array, ""]) -> Images:
    """Apply each degradation to each image with probability one half and a uniform amount; clip to [-1, 1]."""
    for number, function in enumerate((blur, noise, block_noise)):
        on, size, draw = jax.random.split(jax.random.fold_in(rng, number), 3)
        count = images.shape[:1]
        images = function(
            images,
            draw,
            jax.random.bernoulli(on, jnp.float32(0.5), count) * jax.random.uniform(size, count, jnp.float32),
        )
    return jnp.clip(images, -1.0, 1.0)


@functools.cache
def _make_update(graph: Any, classes: int, use_flip: bool) -> tuple[optax.GradientTransformation, Callable[..., tuple]]:
    # Kept by architecture, and the learning rate is an argument, so that training again does not compile again.
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(_WEIGHT_DECAY, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: Any, opt_state: Any, image: jax.Array, label: jax.Array, rng: Key[Array, ""], rate: jax.Array
    ) -> tuple:
        flip_rng, degrade_rng = jax.random.split(rng)
        images = to_float(image)
        images = degrade(flip_some(images, flip_rng) if use_flip else images, degrade_rng)
        targets = optax.smooth_labels(jax.nn.one_hot(label, classes, dtype=jnp.float32), _LABEL_SMOOTHING)

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graph, params)(images)
            right = (logits.argmax(-1) == label).mean()
            return optax.softmax_cross_entropy(logits, targets).mean(), right

        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        directions, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda leaf, direction: leaf - rate * direction, params, directions)
        return params, opt_state, loss, right

    return optimizer, update


def _initial(shapes: Any, seed: int) -> Any:
    """Draw He-normal kernels, unit scales and zero biases on the host: compiling the draws would take many seconds."""
    rng = np.random.default_rng(seed)

    def initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim > 1:
            kernel = rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2.0 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(kernel, leaf.dtype)
        return jnp.full(leaf.shape, 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(initial, shapes)


def _each(amount: Amount) -> Float[Array, "B 1 1 1"]:
    return amount[:, None, None, None]


def _binomial(images: Images, axis: int) -> Images:
    pad = [(0, 0)] * 4
    pad[axis] = (1, 1)
    wide, side = jnp.pad(images, pad, mode="edge"), images.shape[axis]
    left, middle, right = (jax.lax.slice_in_dim(wide, i, i + side, axis=axis) for i in range(3))
    return 0.25 * left + 0.5 * middle + 0.25 * right
