"""Feature networks as the metrics see them: uint8 images in, float32 features out, with a name and a digest.

The networks themselves are `inception.py`, `efficientnet.py` and `classifier.py`. Here they get one interface: batches
are padded to one compiled shape and spread over this process's devices.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from ear_jax.errors import DataError
from ear_jax.metrics import efficientnet
from ear_jax.metrics.classifier import Classifier, forward
from ear_jax.metrics.feature_weights import FeatureWeights, weights_digest
from ear_jax.metrics.inception import INPUT_PX, RESIZE_NAME, TAPS, checked_weights, inception_features
from ear_jax.metrics.protocol import FeatureProtocol
from ear_jax.nn.efficientnet import CLASSES as EFFICIENTNET_CLASSES
from ear_jax.nn.efficientnet import WIDTH as EFFICIENTNET_WIDTH
from ear_jax.nn.functional import flatten

Images = UInt8[np.ndarray, "n h w 3"]
Outputs = dict[str, Float[np.ndarray, "n _"]]

CLASSIFIER_NAME = "classifier"
EFFICIENTNET_NAME = "efficientnet_lite0"
INCEPTION_NAME = "inception-2015-12-05"
"""What results are recorded under; only under this last name is a distance a FID."""


class FeatureNetwork(abc.ABC):
    """What turns images into features that sets of images are compared in.

    Any number of images goes through one compiled shape on all devices of this process.

    Attributes:
        name: `classifier`, `efficientnet_lite0`, `inception-2015-12-05` or the user's.
        digest: identifies the weights; features of different digests are never compared.
        width: features an image.
        image_px: side of the images it takes, or None for any.
        taps: what `outputs` can return: always `features`; `logits` (class scores), `spatial` (for sFID).
        resize: how images become what the network takes, for the protocol.
        classes: how many classes of the data the logits are scores of; 0 where they are of other classes or none.
    """

    taps: tuple[str, ...] = ("features",)
    classes: int = 0

    def __init__(
        self, *, name: str, digest: str, width: int, image_px: int | None, batch_size: int, resize: str
    ) -> None:
        self.name, self.digest, self.width, self.image_px, self.resize = name, digest, width, image_px, resize
        self._mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size

    def features(self, images: Images) -> Float[np.ndarray, "n width"]:
        """Return the features of uint8 images; raises DataError where they are not finite."""
        return self.outputs(images, ("features",))["features"]

    def outputs(self, images: Images, taps: Sequence[str] | None = None) -> Outputs:
        """Return the named taps (all by default) of uint8 images, computed together.

        Raises:
            DataError: the images are not uint8 or have another side than the network takes, or an output is not finite.
            ValueError: there is no tap of that name.
        """
        chosen = self.taps if taps is None else tuple(taps)
        if unknown := [tap for tap in chosen if tap not in self.taps]:
            raise ValueError(f"the network {self.name} has no output {unknown[0]!r}; it has {', '.join(self.taps)}")
        if images.dtype != np.uint8:
            raise DataError(
                f"images have dtype {images.dtype}; the network {self.name} takes uint8 in [0, 255]. Floats in [-1, 1] "
                "become that by ear_jax.folders.pictures.to_uint8."
            )
        if self.image_px is not None and images.shape[1:3] != (self.image_px, self.image_px):
            height, width = images.shape[1:3]
            raise DataError(
                f"the images are {width} x {height} pixels, but the network {self.name} was made for squares of "
                f"{self.image_px}. Score images of that size, or use features=inception, which takes any."
            )
        parts: list[dict[str, np.ndarray]] = []
        ahead: tuple[int, dict[str, jax.Array]] | None = None
        for start in range(0, len(images), self._batch_size):
            chunk = images[start : start + self._batch_size]
            running = len(chunk), self._run(self._placed(chunk), chosen)
            if ahead is not None:  # the device works on this chunk while the last one is read
                parts.append(_read(*ahead))
            ahead = running
        if ahead is None:
            return {tap: np.zeros((0, self.width), np.float32) for tap in chosen}
        parts.append(_read(*ahead))
        whole = {tap: np.concatenate([part[tap] for part in parts]) for tap in chosen}
        self._check_finite(whole)
        return whole

    @abc.abstractmethod
    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        """Return the named taps of one full batch of uint8 images, one program for all of them."""

    def _placed(self, chunk: Images) -> jax.Array:
        filling = np.repeat(chunk[-1:], self._batch_size - len(chunk), axis=0)
        return jax.device_put(np.concatenate([chunk, filling]), NamedSharding(self._mesh, PartitionSpec("data")))

    def _replicated(self, arrays: Any) -> Any:
        return jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec()))

    def _check_finite(self, outputs: Outputs) -> None:
        for tap, values in outputs.items():
            broken = ~np.isfinite(values).all(axis=1)
            if broken.any():
                raise DataError(
                    f"the network {self.name} gives {tap} that are not finite for {int(broken.sum())} of {len(values)} "
                    f"images (first: number {int(broken.argmax())} of the batch). Expected finite numbers: its weights "
                    "are damaged; train or load them anew."
                )


class ClassifierFeatures(FeatureNetwork):
    """The features under the last layer of a judging classifier, and its logits."""

    taps: tuple[str, ...] = ("features", "logits")

    def __init__(self, classifier: Classifier, *, batch_size: int = 256) -> None:
        """Wrap a trained classifier."""
        graph, parameters = nnx.split(classifier, nnx.Param)
        super().__init__(
            name=CLASSIFIER_NAME,
            digest=weights_digest({name: np.asarray(array) for name, array in flatten(parameters).items()}),
            width=classifier.head.in_features,
            image_px=classifier.image_px,
            batch_size=batch_size,
            resize="none",
        )
        self.classifier, self.classes = classifier, classifier.classes
        self._graph, self._parameters = graph, self._replicated(parameters)

    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        outputs = forward(self._graph, self._parameters, images)
        return {tap: outputs[tap] for tap in taps}


class InceptionNetwork(FeatureNetwork):
    """The Inception network of FID: its 2048 pooled features, the logits of the Inception Score, and sFID's tap."""

    taps: tuple[str, ...] = ("features", "logits", "spatial")
    _names = {"features": "2048", "logits": "logits_unbiased", "spatial": "spatial"}  # noqa: RUF012

    def __init__(self, weights: FeatureWeights, *, batch_size: int = 64) -> None:
        """Put the weights on all devices of this process; products are float32's, as in published numbers."""
        super().__init__(
            name=INCEPTION_NAME,
            digest=weights.digest,
            width=TAPS[self._names["features"]],
            image_px=None,
            batch_size=batch_size,
            resize=f"{RESIZE_NAME}-{INPUT_PX}",
        )
        self._weights = self._replicated(checked_weights(weights.arrays))

    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        outputs = inception_features(self._weights, images, tuple(self._names.values()))  # all: one program to compile
        return {tap: outputs[self._names[tap]] for tap in taps}


class EfficientNetNetwork(FeatureNetwork):
    """EfficientNet-Lite0 with ImageNet's published weights: 1,280 pooled features and the scores of 1,000 classes."""

    taps: tuple[str, ...] = ("features", "logits")

    def __init__(self, weights: FeatureWeights, *, knows_classes: bool = False, batch_size: int = 32) -> None:
        """Put the weights on all devices of this process.

        Args:
            weights: `feature_weights.efficientnet_weights()`.
            knows_classes: the data's classes are ImageNet's, in its order: class accuracy can be measured.
            batch_size: images at a time.
        """
        super().__init__(
            name=EFFICIENTNET_NAME,
            digest=weights.digest,
            width=EFFICIENTNET_WIDTH,
            image_px=None,
            batch_size=batch_size,
            resize=efficientnet.RESIZE_NAME,
        )
        self.classes = EFFICIENTNET_CLASSES if knows_classes else 0
        self._compiled, arrays = efficientnet.compiled(weights.arrays)
        self._arrays = self._replicated(arrays)

    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        outputs = self._compiled(self._arrays, images)  # both: one program to compile
        return {tap: outputs[tap] for tap in taps}


class FunctionFeatures(FeatureNetwork):
    """A user's own network: any traceable function of weights and uint8 images."""

    def __init__(
        self,
        function: Callable[[Any, jax.Array], jax.Array],
        weights: Any = None,
        *,
        name: str,
        digest: str,
        width: int,
        image_px: int | None = None,
        batch_size: int = 64,
        resize: str = "none",
    ) -> None:
        """Wrap `function(weights, images)`: uint8 [B,h,w,3] to floats [B, width].

        `name` stands in the result (`fd_<name>`), `digest` must change with the weights, `resize` is for the protocol.

        Raises:
            ValueError: the name is that of a built-in network, which would make its numbers pass for theirs.
        """
        if name in (CLASSIFIER_NAME, EFFICIENTNET_NAME, INCEPTION_NAME, "inception") or not name.isidentifier():
            raise ValueError(f"name={name!r}; expected a name of your own made of letters, digits and underscores.")
        super().__init__(name=name, digest=digest, width=width, image_px=image_px, batch_size=batch_size, resize=resize)
        self._weights = self._replicated(weights)
        self._compiled = jax.jit(function)

    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        return {"features": self._compiled(self._weights, images).astype(jnp.float32)}


def feature_protocol(network: FeatureNetwork, image_px: int, *, rounding: str) -> FeatureProtocol:
    """Return how a network turns images of a size into features, as results record it."""
    return FeatureProtocol(network.name, network.digest, network.resize, image_px, rounding)


def _read(count: int, outputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {tap: np.asarray(values)[:count].astype(np.float32, copy=False) for tap, values in outputs.items()}
