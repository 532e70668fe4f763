"""Configuration without jax: the schema, how values become it, what keys imply for each other, derived sizes."""
