"""ear_jax: class-conditional image generation with continuous tokens drawn in one step, in JAX and Flax NNX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ear_jax.inference.pipeline import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap and leave jax alone; only `load` needs it.
    if name == "load":
        from ear_jax.inference.pipeline import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
