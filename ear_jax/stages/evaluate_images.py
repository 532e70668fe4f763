"""Score images that are there already: a folder of them, or an .npz."""

from typing import Any

from ear_jax.data.image_sets import open_image_set
from ear_jax.data.open import open_split
from ear_jax.data.sources import SplitSource
from ear_jax.errors import DataError
from ear_jax.files import write_json
from ear_jax.metrics.protocol import ROUNDED_BEFORE
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.stages.evaluation_report import judge_protocol, report
from ear_jax.stages.references import (
    chosen_network,
    class_ids,
    open_network,
    open_reference,
    score_settings,
    set_batches,
)
from ear_jax.stages.session import Session


def evaluate_images(session: Session) -> None:
    """Score `config.evaluate.images` and write `evaluation_<its name>.json`.

    Class names in file or folder names (`000012_circle.png`), or `label_arr` in an .npz, give the class accuracy.

    Raises:
        DataError: the images cannot be read, are of several sizes, or of another size than the reference.
    """
    config, settings = session.config, session.config.evaluate
    is_judged = chosen_network(config) == "classifier"
    train: SplitSource | None = None
    if is_judged or not settings.reference:
        train = open_split(config.data, "train", seed=config.seed)
    names = train.class_names if train else ()
    images = open_image_set(settings.images, class_ids=class_ids(names))
    if train is not None and images.image_px != config.data.image_px:
        raise DataError(
            f"the images of {images.path} have {images.image_px} pixels a side, config.data.image_px is "
            f"{config.data.image_px}: the reference would be of another size. Expected one size: set "
            f"--config.data.image_px={images.image_px}, or score other images."
        )
    network = open_network(session, train)
    reference = open_reference(session, network, train)
    scorer = SampleScorer(network, reference, settings=score_settings(config))
    for batch in set_batches(images, settings.batch_size):
        scorer.update(batch)
    scores = scorer.scores(source=f"{images.path}, digest {images.digest}", rounding=ROUNDED_BEFORE)
    result: dict[str, Any] = {
        "images": str(images.path),
        "scores": scores.values,
        "class_accuracy_by_class": {names[label]: right for label, right in scores.by_class.items()},
        "warnings": [*images.notes, *scores.warnings],
        "collapse": list(scores.alarms),
        "protocol": {**({"judge": judge_protocol(config)} if is_judged else {}), "scores": scores.protocol},
    }
    path = session.workdir.root / f"evaluation_{images.path.stem}.json"
    if session.is_first:
        write_json(path, result)
    session.ledger.event("evaluation", stage="images", **result)
    report(session, result)
    session.say(f"evaluation  written to {path}")
