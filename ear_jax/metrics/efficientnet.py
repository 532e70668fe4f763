"""EfficientNet-Lite0 as a judge of images of any size: resized and cropped as for its own top-1, weights an argument.

The network itself is `nn/efficientnet.py`, since tokenizers are trained by it too.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ear_jax.nn.efficientnet import INPUT_PX, EfficientNetLite0
from ear_jax.nn.functional import functional

RESIZE_PX = 256
RESIZE_NAME = f"bicubic-short-side-{RESIZE_PX}-crop-{INPUT_PX}"
"""What a result's protocol says of the resize."""

Run = Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]
"""(arrays, uint8 images) -> pooled `features` and `logits`."""

FIRST_SYNSET, LAST_SYNSET = "n01440764", "n15075141"


def compiled(weights: Mapping[str, np.ndarray]) -> tuple[Run, dict[str, jax.Array]]:
    """Return the network as a function of its arrays and uint8 images, one program a shape, and the arrays.

    Raises:
        DataError: the weights do not fit.
    """
    static, parameters, frozen = functional(EfficientNetLite0(weights))
    return jax.jit(lambda arrays, images: static.merge(arrays)(resized(images))), {**parameters, **frozen}


def resized(images: UInt8[Array, "B h w 3"]) -> Float[Array, "B 224 224 3"]:
    """Return the centre of images whose short side becomes 256 pixels, bicubic and antialiased, within [0, 255].

    Only what the crop keeps is computed. Unlike in an image library, no pixel is rounded on the way.
    """
    height, width = images.shape[1:3]
    short, values = min(height, width), images.astype(jnp.float32)
    if short == RESIZE_PX:
        top, left = (height - INPUT_PX) // 2, (width - INPUT_PX) // 2
        return values[:, top : top + INPUT_PX, left : left + INPUT_PX]
    sides = [round(side * RESIZE_PX / short) for side in (height, width)]
    scales = [after / before for after, before in zip(sides, (height, width), strict=True)]
    offsets = [float(-((side - INPUT_PX) // 2)) for side in sides]
    cropped = jax.image.scale_and_translate(
        values,
        (len(images), INPUT_PX, INPUT_PX, images.shape[3]),
        (1, 2),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(offsets, jnp.float32),
        "cubic",
        antialias=True,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.clip(cropped, 0.0, 255.0)


def is_imagenet(class_names: tuple[str, ...]) -> bool:
    """Return whether classes are ImageNet's 1,000 by their synsets, in the order of the network's scores."""
    return (
        len(class_names) == 1000
        and (class_names[0], class_names[-1]) == (FIRST_SYNSET, LAST_SYNSET)
        and (list(class_names) == sorted(set(class_names)))
    )
