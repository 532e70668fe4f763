"""Benchmarks: timings that were measured, with their spread."""
