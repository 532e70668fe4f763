"""Backbones: tokens, condition and mask to hidden states."""
