"""Checkpoints that are verified: orbax, with a digest of every array."""
