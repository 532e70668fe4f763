"""Metrics of images and tokens."""
