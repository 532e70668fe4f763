"""Layers that know no images."""
