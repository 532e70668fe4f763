"""Training: state, step, optimiser, loop and what watches it."""
