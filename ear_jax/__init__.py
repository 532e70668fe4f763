"""Class-conditional image generation with continuous tokens drawn in one step, in JAX and Flax NNX.

    model = ear_jax.load("runs/demo")
    images = model.sample(["star", "ring"], seed=0)

Everything else is done from the command line: `ear_jax --help`, or `python -m ear_jax --help`. What `load` returns is
described by `help(type(model))`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ear_jax.inference.pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | os.PathLike[str], *, devices: Any = None) -> "ear_jax.inference.pipeline.Pipeline":
    """Load a model folder, or the one inside a workdir, as a pipeline: sample, encode, decode, info, save.

    Args:
        path: model folder or workdir.
        devices: a jax device or several to run on; None takes all of this process.

    Raises:
        ConfigError: the folder holds no model, or one this version cannot build.
        DataError: its tensors are damaged.
    """
    # Importing the package must stay cheap and leave jax alone; only this function needs it.
    from ear_jax.inference import pipeline

    return pipeline.load(path, devices=devices)
