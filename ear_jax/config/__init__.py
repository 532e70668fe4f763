"""Configuration without jax: the schema, how values become it, what keys imply for each other, derived sizes."""

from ear_jax.config.schema import Config
from ear_jax.config.strict import difference, digest, from_dict, resolve, to_dict

__all__ = ["Config", "difference", "digest", "from_dict", "resolve", "to_dict"]
