"""Matrix products between rows of features, where they run fastest with enough digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def inner_products(
    a: Float[np.ndarray, "M D"], b: Float[np.ndarray, "N D"], *, on_accelerator: bool | None = None
) -> Float[np.ndarray, "M N"]:
    """Return a @ b.T: float64 on the host, or float32 without reduced-precision passes on an accelerator.

    Args:
        a: Rows.
        b: Rows; passing the same array as `a` halves the work on the host.
        on_accelerator: Where to compute; None decides by jax's default backend.
    """
    if on_accelerator is None:
        on_accelerator = jax.default_backend() != "cpu"
    if on_accelerator:
        return np.asarray(_on_accelerator(a.astype(np.float32), b.astype(np.float32)))
    left = a.astype(np.float64, copy=False)
    return left @ (left if a is b else b.astype(np.float64, copy=False)).T


@functools.partial(jax.jit)
def _on_accelerator(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
