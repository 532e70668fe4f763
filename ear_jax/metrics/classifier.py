"""A small residual classifier that judges generated images: does a sample show the class that was asked for?

It is trained on real images with the degradations of `degradations.py`. Keeping one on disk is `classifier_store.py`.
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

from ear_jax.metrics.degradations import DEGRADATIONS, degrade, flip_some
from ear_jax.types import Batch

LEAST_SIDE_PX = 16
_LAST_GRID = 4
_LABEL_SMOOTHING = 0.05
_PEAK_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 0.02
_LOG_EVERY_STEPS = 100
_CHUNK = 256

Images = UInt8[np.ndarray, "B h w 3"] | Float[np.ndarray, "B h w 3"] | UInt8[Array, "B h w 3"] | Float[Array, "B h w 3"]


class _Block(nnx.Module):
    """Two normalised convolutions beside a shortcut; the first halves the grid where `stride` is 2."""

    def __init__(self, channels_in: int, channels: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.norm_1 = _norm(channels_in, rngs)
        self.conv_1 = nnx.Conv(channels_in, channels, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm_2 = _norm(channels, rngs)
        self.conv_2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(channels_in, channels, (1, 1), strides=stride, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm_1(x))
        return self.shortcut(h) + self.conv_2(nnx.relu(self.norm_2(self.conv_1(h))))


class Classifier(nnx.Module):
    """Residual network: a stride-2 stem, blocks that halve the grid down to 4 x 4, mean pooling, one linear layer."""

    def __init__(self, *, classes: int, channels: int, image_px: int, seed: int = 0) -> None:
        """Make a classifier for square images of `image_px`, `channels` wide at the first grid, at most 8 x that later.

        Raises:
            ValueError: The images are smaller than 16 pixels.
        """
        if image_px < LEAST_SIDE_PX:
            raise ValueError(f"image_px={image_px}; the classifier needs at least {LEAST_SIDE_PX}.")
        self.classes, self.channels, self.image_px = classes, channels, image_px
        rngs = nnx.Rngs(seed)
        grid, width = image_px // 2, channels
        self.stem = nnx.Conv(3, width, (4, 4), strides=2, rngs=rngs)
        blocks = [_Block(width, width, stride=1, rngs=rngs)]
        while grid > _LAST_GRID:
            wider = min(2 * width, 8 * channels)
            blocks.append(_Block(width, wider, stride=2, rngs=rngs))
            grid, width = -(-grid // 2), wider
        self.blocks = nnx.List(blocks)
        self.norm = _norm(width, rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B E"]:
        """Return the pooled features under the linear layer, of images in [-1, 1]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return nnx.relu(self.norm(x)).mean((1, 2))

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B V"]:
        """Return the logits of images in [-1, 1]."""
        return self.head(self.features(images))


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
        channels: Channels at the first grid; 16 does for shapes, 48 or more for photographs.
        seed: Seed of the initial weights, flips and degradations.
        image_px: Side of the images, at least 16.
        use_flip: Mirror half of the images; switch it off where left and right are classes.
        log: Receives a line of progress now and then.
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
        images = _to_float(image)
        images = degrade(flip_some(images, flip_rng) if use_flip else images, degrade_rng)
        targets = optax.smooth_labels(jax.nn.one_hot(label, classes), _LABEL_SMOOTHING)

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

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim > 1:
            kernel = rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2.0 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(kernel, leaf.dtype)
        return jnp.full(leaf.shape, 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def predict(classifier: Classifier, images: Images) -> Int[np.ndarray, " B"]:
    """Return the likeliest class of each image (uint8, or floats in [-1, 1])."""
    return _in_chunks(classifier, images, "logits").argmax(-1).astype(np.int32)


def features(classifier: Classifier, images: Images) -> Float[np.ndarray, "B E"]:
    """Return the features of each image (uint8, or floats in [-1, 1]), for distances between sets of images."""
    return _in_chunks(classifier, images, "features")


def accuracy(classifier: Classifier, images: Images, labels: Int[np.ndarray, " B"]) -> float:
    """Return the fraction of images that the classifier assigns to their label; raises ValueError without images."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(images)} images; expected one each, and at least one.")
    return float((predict(classifier, images) == np.asarray(labels)).mean())


def trust_report(
    classifier: Classifier, images: Images, labels: Int[np.ndarray, " B"], *, seed: int = 0
) -> dict[str, float]:
    """Return the accuracy on held-out images, clean and under each degradation at half strength.

    An accuracy of samples can only be trusted as far as these are high.
    """
    result = {"accuracy_clean": accuracy(classifier, images, labels)}
    floats, half = _to_float(jnp.asarray(images)), jnp.full(len(images), 0.5)
    for name, function in DEGRADATIONS.items():
        worse = jnp.clip(jax.jit(function)(floats, jax.random.key(seed), half), -1.0, 1.0)
        result[f"accuracy_{name}"] = accuracy(classifier, worse, labels)
    return result


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    groups = next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
    return nnx.GroupNorm(channels, num_groups=groups, use_fast_variance=False, rngs=rngs)


def _to_float(images: jax.Array) -> jax.Array:
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(graph: Any, params: Any, images: jax.Array, what: str) -> jax.Array:
    classifier = nnx.merge(graph, params)
    return classifier.features(_to_float(images)) if what == "features" else classifier(_to_float(images))


def _in_chunks(classifier: Classifier, images: Images, what: str) -> np.ndarray:
    graph, params = nnx.split(classifier)
    outputs = []
    for start in range(0, len(images), _CHUNK):
        chunk = np.asarray(images[start : start + _CHUNK])
        # One shape, so one compiled program; the filling is cut off again.
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], _CHUNK - len(chunk), axis=0)])
        outputs.append(np.asarray(_forward(graph, params, filled, what))[: len(chunk)])
    return np.concatenate(outputs)
