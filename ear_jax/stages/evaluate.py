"""Measure a model, or images that are there already, and write the numbers with all that they depend on."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ear_jax.config.derive import stage_lengths
from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.config.uses import drawing
from ear_jax.config.values import flatten
from ear_jax.data.image_sets import open_image_set
from ear_jax.data.open import open_split
from ear_jax.data.sources import Renumbered, SplitSource, Subset, in_order
from ear_jax.data.tree import class_order
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import digest_of, read_json, write_json
from ear_jax.folders import model_folder, sample_set
from ear_jax.inference import pipeline
from ear_jax.metrics.classifier_training import accuracy_when_degraded
from ear_jax.metrics.collector import ScoreSettings
from ear_jax.metrics.feature_weights import lpips_weights
from ear_jax.metrics.features import ClassifierFeatures
from ear_jax.metrics.protocol import ROUNDED_BEFORE
from ear_jax.metrics.reconstruction import Distance, Reconstructions, ReconstructionScorer
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.metrics.scores import Scores
from ear_jax.nn.functional import functional
from ear_jax.nn.perceptual import PerceptualDistance
from ear_jax.stages.drawn import measure_streams, sampling_protocol, score_samples
from ear_jax.stages.evaluation_report import judge_protocol, report
from ear_jax.stages.references import (
    Measure,
    chosen_network,
    class_ids,
    open_measure,
    open_network,
    open_reference,
    score_settings,
    set_batches,
    source_batches,
)
from ear_jax.stages.session import Session, fingerprint
from ear_jax.training.ledger import TensorBoard
from ear_jax.types import Tokens

FIRST_SAMPLE = 1 << 20
"""Number of the first sample that is scored: none of those that `--task=sample` draws."""

TRUST_IMAGES = 1_000
JUDGED = ("class_accuracy",)


def evaluate(session: Session, *, model: str | None = None) -> None:
    """Write `evaluation.json`: reconstructions, samples, and how far the judge can be trusted.

    Skipped when nothing has changed. Whatever network the distances use, samples are also judged by a small classifier
    trained on the real images with noise, blur and block noise; its own accuracy stands beside the result.

    Raises:
        ConfigError: the model knows other classes than the data.
        DataError: weights, reference or images cannot be used.
    """
    config, workdir = session.config, session.workdir
    chosen = model or workdir.model("generator")
    weights = digest_of((model_folder.find(chosen) / "config.json").read_bytes())  # holds the hashes of the weights
    begun = config if model else session.as_begun
    made_from = digest_of(fingerprint(begun, "generator"), weights, *_dependencies(config), *session.images_digest)
    known = read_json(workdir.evaluation)
    if known is not None and workdir.is_complete("evaluation", made_from=made_from):
        session.say(f"evaluation  complete in {workdir.evaluation}")
        report(session, known)
        return
    loaded = pipeline.load(chosen, drawn_as=config)
    train = in_order(open_split(config.data, "train", seed=config.seed), loaded.class_names)
    held_out = in_order(open_split(config.data, "eval", seed=config.seed), loaded.class_names)
    if isinstance(train, Renumbered):
        session.say(f"data        its classes are matched with the model's by name, whose order is {_first(loaded)}")
    is_numbered = loaded.class_names == tuple(map(str, range(len(train.class_names))))
    if train.class_names != loaded.class_names and not is_numbered:
        raise ConfigError(
            f"{chosen} knows {len(loaded.class_names)} classes ({', '.join(loaded.class_names[:5])} …), but "
            f"config.data.source={config.data.source} has {len(train.class_names)} "
            f"({', '.join(train.class_names[:5])} …). Evaluate on the data that the model was trained on."
        )
    lpips, lpips_digest = _lpips(config)
    measure = open_measure(session, train)
    trust, warnings = _trust(measure.judge, held_out, config)
    if is_numbered and train.class_names != loaded.class_names:
        warnings.append("The model numbers its classes: they are taken to be the data's, in their order.")
    reconstructed, judged_accuracy = _reconstructions(loaded, measure, held_out, config, lpips)
    scores, judged = _samples(loaded, measure, config, weights)
    streams = measure_streams(loaded, held_out, config)
    parts = {f"reconstructions ({name})": part for name, part in reconstructed.items()} | {"samples": scores}
    warnings += [f"{what}: {warning}" for what, part in parts.items() for warning in part.warnings]
    result = {
        "psnr_db": {name: part.values["psnr"] for name, part in reconstructed.items()},
        "classifier": trust,
        "class_accuracy_reconstructions": judged_accuracy,
        "class_accuracy_samples": judged.values["class_accuracy"],
        "class_accuracy_by_class": {loaded.class_names[label]: right for label, right in judged.by_class.items()},
        "scores": scores.values,
        "reconstruction_scores": {name: part.values for name, part in reconstructed.items()},
        "streams": {} if streams is None else dataclasses.asdict(streams),
        "warnings": warnings,
        "collapse": [*reconstructed["full"].alarms, *scores.alarms, *(() if streams is None else streams.alarms)],
        "protocol": {
            "judge": judge_protocol(config),
            "judge_weights_sha256": measure.judge.digest,
            "lpips_weights_sha256": lpips_digest,
            "samples": config.evaluate.samples,
            "reconstructions": min(config.evaluate.reconstructions, len(held_out)),
            "weights": "moving average",
            **sampling_of(config).record(),
            "seed": config.sample.seed,
            "drawing": drawing(config),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "scores": scores.protocol,
            "reconstruction_scores": reconstructed["full"].protocol,
        },
    }
    if session.is_first:
        write_json(workdir.evaluation, result)
        workdir.mark_complete("evaluation", made_from=made_from)
        steps = stage_lengths(config.generator_training, len(train)).total_steps
        with TensorBoard(workdir.tensorboard, tracker=session.tracker) as tensorboard:
            tensorboard.result(steps, flatten(config), _numbers(result))
    session.ledger.event("evaluation", stage="generator", **result)
    report(session, result)


def evaluate_images(session: Session) -> None:
    """Score `config.evaluate.images`, a folder or an .npz, and write `evaluation_<its name>.json`.

    Class names in file or folder names (`000012_circle.png`), or `label_arr` in an .npz, give the class accuracy.

    Raises:
        DataError: the images cannot be read, are of several sizes, or of another size or of more classes than the data.
    """
    config, settings = session.config, session.config.evaluate
    is_judged = chosen_network(config) == "classifier"
    needs_data = is_judged or not settings.reference
    train = open_split(config.data, "train", seed=config.seed) if needs_data else None
    names = train.class_names if train else ()
    images = open_image_set(settings.images, class_ids=class_ids(names))
    if images.labels is not None and images.path.is_file() and class_order(names) != class_order(names, "text"):
        session.say(f"labels      class ids of {images.path.name} are taken in the order of the data's classes")
    if train is not None and images.labels is not None and images.labels.max() >= len(names):
        raise DataError(
            f"the labels of {images.path} go up to {images.labels.max()}, but {config.data.source} has {len(names)} "
            f"classes. Expected ids 0 to {len(names) - 1}, in the order {', '.join(names[:4])} …; mend the labels, or "
            "take them out to score without classes."
        )
    if train is not None and images.image_px != config.data.image_px:
        raise DataError(
            f"the images of {images.path} have {images.image_px} pixels a side, config.data.image_px is "
            f"{config.data.image_px}: the reference would be of another size. Expected one size: set "
            f"--config.data.image_px={images.image_px}, or score other images."
        )
    asked = (read_json(images.path / sample_set.RECORD) or {}).get("count", images.count)
    short = [f"{images.count} images, but {asked} were asked for: drawing was interrupted, or files came or went."]
    network = open_network(session, train)
    scorer = SampleScorer(network, open_reference(session, network, train), settings=score_settings(config))
    for batch in set_batches(images, settings.batch_size):
        scorer.update(batch)
    scores = scorer.scores(source=f"{images.path}, digest {images.digest}", rounding=ROUNDED_BEFORE)
    result: dict[str, Any] = {
        "images": str(images.path),
        "scores": scores.values,
        "class_accuracy_by_class": {names[label]: right for label, right in scores.by_class.items()},
        "warnings": [*images.notes, *(short if asked != images.count else []), *scores.warnings],
        "collapse": list(scores.alarms),
        "protocol": {**({"judge": judge_protocol(config)} if is_judged else {}), "scores": scores.protocol},
    }
    path = session.workdir.root / f"evaluation_{images.path.stem}.json"
    if session.is_first:
        write_json(path, result)
    session.ledger.event("evaluation", stage="images", **result)
    report(session, result)
    session.say(f"evaluation  written to {path}")


def _first(loaded: pipeline.Pipeline) -> str:
    return ", ".join(loaded.class_names[:4]) + (" …" if len(loaded.class_names) > 4 else "")


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """Return the scores of an evaluation by name, without their details."""
    groups = {"": result["scores"], "psnr_db_": result["psnr_db"]}
    named = {f"{prefix}{name}": value for prefix, values in groups.items() for name, value in values.items()}
    return named | {name: result[name] for name in ("class_accuracy_reconstructions", "class_accuracy_samples")}


def _samples(loaded: pipeline.Pipeline, measure: Measure, config: Config, weights: str) -> tuple[Scores, Scores]:
    """Return the scores in the chosen network and the judge's, which are the same ones where that is the judge."""
    settings = score_settings(config)
    if measure.judges_alone and settings.metrics:
        settings = dataclasses.replace(settings, metrics=tuple(dict.fromkeys((*settings.metrics, *JUDGED))))
    scorers = [SampleScorer(measure.network, measure.reference, settings=settings)]
    if not measure.judges_alone:
        scorers.append(SampleScorer(measure.judge, None, settings=ScoreSettings(JUDGED)))
    sampling = sampling_protocol(loaded, config, weights, use_ema=True)
    count = config.evaluate.samples
    found = score_samples(scorers, loaded, config, count=count, first=FIRST_SAMPLE, sampling=sampling)
    return found[0], found[-1]


def _reconstructions(
    loaded: pipeline.Pipeline, measure: Measure, held_out: SplitSource, config: Config, lpips: Distance | None
) -> tuple[dict[str, Scores], float]:
    """Return the scores of held-out images from all tokens and, where there are two kinds, from the discrete ones.

    With them comes the judge's class accuracy; in the scores stands that of the network where it knows the classes.
    """
    images = Subset(held_out, config.evaluate.reconstructions, seed=config.seed)
    sizes = [level.size for level in loaded.spec.levels if level.kind == "discrete"]
    network, reference = measure.network, measure.reference
    scorers = {"full": ReconstructionScorer(network, lpips=lpips, codebook_sizes=sizes, reference=reference)}
    if 0 < len(sizes) < len(loaded.spec.levels):
        scorers["coarse"] = ReconstructionScorer(network)
    if not measure.judges_alone:
        scorers["judged"] = ReconstructionScorer(measure.judge, settings=ScoreSettings(JUDGED))
    for batch in source_batches(images, config):
        tokens = loaded.encode(batch.images)
        codes = tuple(np.asarray(level) for level in tokens.levels if level.ndim == 2)
        full = Reconstructions(batch.images, loaded.decode(tokens), batch.labels, codes, batch.numbers)
        for name, scorer in scorers.items():
            if name == "coarse":
                decoded = loaded.decode(Tokens(tokens.levels[: len(codes)]))
                scorer.update(full._replace(images=decoded, codes=()))
            else:
                scorer.update(full)
    source = f"{len(images)} held-out images of {config.data.source}"
    found = {name: scorer.scores(source=source, source_digest=images.digest) for name, scorer in scorers.items()}
    judged = found.pop("judged", found["full"]).values["class_accuracy"]
    found["full"].values.setdefault("class_accuracy", judged)
    return found, judged


def _lpips(config: Config) -> tuple[Distance | None, str]:
    """Return LPIPS as one program, and the digest of its weights; nothing where none were given."""
    path = config.evaluate.lpips_weights
    if not path:
        return None, ""
    weights = lpips_weights("" if path == "download" else path)
    static, parameters, frozen = functional(PerceptualDistance(weights.arrays))
    arrays = {**parameters, **frozen}
    compiled = jax.jit(lambda arrays, images, originals: static.merge(arrays)(images, originals))
    return lambda images, originals: compiled(arrays, images, originals), weights.digest


def _trust(judge: ClassifierFeatures, held_out: SplitSource, config: Config) -> tuple[dict[str, float], list[str]]:
    """Return the judge's accuracy on held-out images, clean and degraded, and what to beware of."""
    batches = list(source_batches(Subset(held_out, TRUST_IMAGES, seed=config.seed), config))
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    trust = accuracy_when_degraded(judge.classifier, np.concatenate([batch.images for batch in batches]), labels)
    warnings, worst = [], min(trust.values())
    if judge.classes == 1:
        warnings.append(
            "The data has one class: the judging classifier learns nothing from it, so its features and accuracy mean "
            "nothing. Use --config.evaluate.features=efficientnet_lite0 or inception."
        )
    elif worst < 0.5 * (1 + 1 / judge.classes):
        warnings.append(
            f"The judging classifier is right on {trust['accuracy_clean']:.1%} of clean and {worst:.1%} of the worst "
            "degraded held-out images: its distances and class accuracies cannot be trusted beyond that. Raise "
            "config.evaluate.classifier_steps or classifier_channels."
        )
    return trust, warnings


def _dependencies(config: Config) -> tuple[Any, ...]:
    """Return everything that an evaluation depends on, beside the model and its data."""
    settings = dataclasses.replace(config.evaluate, every_steps=0, every_samples=2)
    files = [Path(path) for path in (settings.reference, settings.inception_weights, settings.lpips_weights) if path]
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    groups = (config.sample, settings, config.stats)
    return chosen_network(config), stamps, *drawing(config).values(), *(dataclasses.astuple(group) for group in groups)
