"""Making the array_record files of a tfds: data set: the only place where TensorFlow is imported.

Reading them afterwards, here or on another machine, needs no TensorFlow.
"""

import importlib
from collections.abc import Callable

from ear_jax.config.schema import DataConfig
from ear_jax.data.tfds import data_directory, feature_names
from ear_jax.errors import ConfigError, DataError


def prepare(config: DataConfig, report: Callable[[str], None] = print) -> str:
    """Download and convert the configured data set once, and return the folder that holds it.

    Sources that need no preparation return "". Raises ConfigError for an unknown data set or when TensorFlow is
    missing, DataError when the download or the conversion fails.
    """
    kind, _, name = config.source.partition(":")
    if kind != "tfds":
        report(f"data.source={config.source} needs no preparation")
        return ""
    import tensorflow_datasets as tfds

    directory = data_directory(config.tfds_directory)
    try:
        builder = tfds.builder(name.replace(":", "/"), data_dir=directory, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError) as fault:
        first = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
        raise ConfigError(f"config.data.source=tfds:{name}: {first}") from None
    feature_names(name, builder.info.features)
    if builder.is_prepared():
        report(f"{builder.data_dir} is there already")
        return str(builder.data_dir)
    _require_tensorflow(name)
    report(f"preparing {name} in {builder.data_dir}")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as fault:  # download, archive and disk errors of many libraries; the cause is in the message
        raise DataError(f"tfds:{name} could not be prepared: {fault}") from fault
    return str(builder.data_dir)


def _require_tensorflow(name: str) -> None:
    try:
        importlib.import_module("tensorflow")
    except ImportError:
        raise ConfigError(
            f"preparing tfds:{name} needs TensorFlow, which is not installed. Install the extra once "
            '(pip install "ear_jax[tf]") and repeat; reading the prepared files needs no TensorFlow'
        ) from None
