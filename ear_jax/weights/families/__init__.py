"""Weights of the published systems, in and out: which of their arrays is which of ours."""
