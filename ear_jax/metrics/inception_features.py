"""Images to features by the Inception network of FID, and the record of what decided them.

The network is `inception.py`, its weights `feature_weights.py`; the metrics are computed from what this gives.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ear_jax.errors import DataError
from ear_jax.metrics.inception import INPUT_PX, TAPS, Inception
from ear_jax.metrics.resize import RESIZE_NAME, resize_tensorflow1
from ear_jax.nn.functional import functional

NETWORK_NAME = "inception-2015-12-05"
"""What a result's protocol says of the network."""


class InceptionFeatures:
    """The network with its weights: uint8 images in, features by tap out, and what a protocol says of it.

    One program is compiled for each batch size and choice of taps, whatever the size of the images; a small one more
    resizes each size.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        digest: str,
        dtype: DTypeLike = jnp.float32,
        sharding: jax.sharding.Sharding | None = None,
    ):
        """Put the weights on the device.

        Args:
            arrays: Weights by their path in `Inception`, as `feature_weights.inception_weights` reads them.
            digest: Digest of the weights, for the protocol.
            dtype: Of the products. Published numbers are float32's; bfloat16 is faster on accelerators, and recorded.
            sharding: Where the weights lie; replicated over a mesh to run on batches that are sharded over it.

        Raises:
            DataError: the weights are those of another network, or not finite.
        """
        shapes, self._run = _program(jnp.dtype(dtype))
        _check(arrays, shapes)
        self.digest, self.dtype = digest, jnp.dtype(dtype)
        host = {name: np.ascontiguousarray(arrays[name], np.float32) for name in shapes}
        self._arrays = jax.tree.map(jnp.asarray, host) if sharding is None else jax.device_put(host, sharding)

    @property
    def protocol(self) -> dict[str, str]:
        """What decides the features, for the record of a result and for comparing it with a reference."""
        return {
            "network": NETWORK_NAME,
            "weights_sha256": self.digest,
            "resize": f"{RESIZE_NAME}-{INPUT_PX}",
            "dtype": self.dtype.name,
        }

    def __call__(
        self, images: UInt8[Array, "B h w 3"] | UInt8[np.ndarray, "B h w 3"], taps: Sequence[str] = ("2048",)
    ) -> dict[str, Float[Array, "B _"]]:
        """Return the features of uint8 images of any size at the asked taps; what no tap needs is not computed.

        Raises:
            ValueError: there is no tap of that name.
        """
        unknown = [tap for tap in taps if tap not in TAPS]
        if unknown:
            raise ValueError(f"the Inception network has no tap {unknown[0]!r}; it has {', '.join(TAPS)}")
        return self._run(self._arrays, _resize(images), tuple(taps))


_resize = jax.jit(lambda images: resize_tensorflow1(images, INPUT_PX))


@functools.cache
def _program(dtype: jnp.dtype) -> tuple[Mapping[str, jax.ShapeDtypeStruct], Callable[..., dict[str, jax.Array]]]:
    """Return the shapes of the weights and the program that runs on them, one for all weights."""
    static, shapes, _ = functional(nnx.eval_shape(lambda: Inception(dtype=dtype)))

    # The weights are an argument: as constants they would be compiled in, 95 MB a program.
    @functools.partial(jax.jit, static_argnames="taps")
    def run(arrays: dict[str, jax.Array], pixels: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        outputs = static.merge(arrays, {})(pixels)
        return {tap: outputs[tap] for tap in taps}

    return shapes, run


def _check(arrays: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    for name, leaf in expected.items():
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
            raise DataError(
                f"the Inception weights do not fit: {name} {found}, expected shape {leaf.shape}. They must be those of "
                "the FID network (1008 classes), which torchvision's ImageNet classifier (1000 classes) is not."
            )
        if not np.isfinite(arrays[name]).all():
            raise DataError(f"the Inception weights are damaged: {name} has values that are not finite; get them anew")
