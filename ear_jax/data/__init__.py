"""Images from disk or from formulas to batches of numpy arrays. Nothing here imports jax."""
