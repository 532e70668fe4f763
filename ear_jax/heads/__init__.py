"""Heads: hidden states to a loss, hidden states to tokens."""
