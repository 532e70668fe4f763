"""Build the statistics of real images that samples are compared with, at any size and of any source."""

import re

from ear_jax.config.schema import Config
from ear_jax.io.download import file_sha256
from ear_jax.tasks.references import measure_reference, open_network, split_of
from ear_jax.tasks.session import Session, open_session


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Measure `config.stats` and write `WORKDIR/stats_<name>.npz`."""
    with open_session(config, workdir) as session:
        make_stats(session)


def make_stats(session: Session) -> None:
    """Write mean, covariance and count of the features, readable by other evaluators, and a draw of rows beside them.

    Raises:
        ConfigError, DataError: the data or the network's weights cannot be used.
        StorageError: the file cannot be written.
    """
    config = session.config
    source = split_of(config)
    network = open_network(session)
    path = session.workdir.root / f"stats_{config.stats.name or _name(config)}.npz"
    reference = measure_reference(session, network, source, path)
    if session.is_first:
        count, width = reference.statistics.pooled.count, reference.statistics.pooled.width
        print(f"stats       {count} images of {config.data.source} ({config.stats.split}), {config.data.image_px} px")
        print(f"stats       {width} features of {network.name}, weights {network.digest[:16]}")
        if count is not None and count <= width:
            print(f"warning     {count} images for {width} features: the covariance is singular; take more images.")
        print(f"stats       data {source.digest}, file {file_sha256(path)}")
        print(f"stats       written to {path}; use it with --config.evaluate.reference={path}", flush=True)


def _name(config: Config) -> str:
    source = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[-40:].strip("-")
    return f"{source}_{config.data.image_px}px_{config.stats.split}"
