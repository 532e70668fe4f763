"""Make the record files of a tfds:NAME data set, where the source is one and they are not there."""

from ear_jax.config.schema import Config


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Prepare `config.data.source`; other sources need nothing."""
    if config.data.source.startswith("tfds:"):
        from ear_jax.data.prepare import prepare  # TensorFlow comes in here and nowhere else

        prepare(config.data)
