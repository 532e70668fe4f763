"""Generators: one file a kind, and what kinds share."""
