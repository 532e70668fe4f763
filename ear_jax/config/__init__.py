"""Configuration without jax: the schema, how values become it, what keys imply for each other, derived sizes."""

from ear_jax.config.read import from_dict, resolve, to_dict
from ear_jax.config.schema import Config

__all__ = ["Config", "from_dict", "resolve", "to_dict"]
