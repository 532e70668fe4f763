"""`python -m ear_jax` is `python -m ear_jax.main`."""

from ear_jax.main import run

if __name__ == "__main__":
    run()
