"""What a recipe asks to be measured and never can be: refused before anything trains, not after."""

from ear_jax.config.schema import LEAST_JUDGED_PX, Config
from ear_jax.errors import ConfigError, DataError


def check_judged(config: Config) -> None:
    """Refuse images that are too small for the classifier that judges every evaluation.

    Raises:
        ConfigError: they are.
    """
    if config.data.image_px < LEAST_JUDGED_PX:
        raise ConfigError(
            f"config.data.image_px={config.data.image_px}: the judging classifier needs images of at least "
            f"{LEAST_JUDGED_PX} pixels. Run the stages alone (--task=tokenizer, latents, generator, sample) to leave "
            "the evaluation out, or train on larger images."
        )


def check_metrics(config: Config, *, images: int, held_out: int | None, classes: int) -> None:
    """Refuse metrics that were asked for by name and need more images, or another network, than there are.

    Args:
        config: the recipe.
        images: training images.
        held_out: evaluation images; None where they have not been counted.
        classes: of the data.

    Raises:
        ConfigError: too few samples are to be drawn, or the network of the distances cannot give it.
        DataError: the data are too few.
    """
    settings = config.evaluate
    asked = [name.strip() for name in settings.metrics.split(",")]
    if "all" in asked:
        return
    from ear_jax.metrics.sample_scorer import METRICS  # late: most runs measure all that can be

    real = images if config.stats.split == "train" else held_out
    if real is not None and config.stats.images:
        real = min(real, config.stats.images)
    for metric in (METRICS[name] for name in asked):
        shown = f"config.evaluate.metrics asks for {metric.name}"
        if metric.is_of_inception and settings.features not in ("auto", "inception"):
            raise ConfigError(f"{shown}, but config.evaluate.features={settings.features}; it needs {metric.needs}.")
        wanted = (metric.least - 1) * classes + 1 if metric.is_by_class else metric.least
        kept = settings.knn_samples if "rows" in metric.collects else wanted
        if settings.samples < wanted or kept < metric.least:
            raise ConfigError(
                f"{shown}, which needs at least {wanted} samples, but config.evaluate.samples={settings.samples} and "
                f"knn_samples={settings.knn_samples}. Raise them, or leave {metric.name} out."
            )
        has_reference = {"moments", "spatial", "rows"} & set(metric.collects)
        if has_reference and not settings.reference and real is not None and real < metric.least:
            raise DataError(
                f"{shown}, which needs at least {metric.least} real images, but {config.data.source} has {real} of "
                f"config.stats.split={config.stats.split}. Give more images, or leave {metric.name} out."
            )
