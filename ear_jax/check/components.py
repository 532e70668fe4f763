"""Checks of what a model is made by and measured with, at the smallest size: updates, losses, judge and metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ear_jax import build
from ear_jax.bench import plausibility
from ear_jax.check.checklist import Outcome
from ear_jax.check.tiny import BATCH_SIZE, CLASSES, random_weights
from ear_jax.config import kinds
from ear_jax.config.derive import stage_lengths
from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.data.loader import Loader
from ear_jax.data.sources import SplitSource
from ear_jax.heads.energy import EnergyHead
from ear_jax.metrics.classifier_training import train_classifier
from ear_jax.metrics.collector import ImageBatch
from ear_jax.metrics.distances import frechet_distance
from ear_jax.metrics.diversity import energy_score
from ear_jax.metrics.features import ClassifierFeatures
from ear_jax.metrics.reconstruction import Reconstructions, ReconstructionScorer
from ear_jax.metrics.reference import reference_moments
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.metrics.statistics import statistics_of
from ear_jax.training.optim import make_optimizer, resolve
from ear_jax.training.step import create_state, make_train_step
from ear_jax.types import Group, TokenizerSpec, usual_group

QUICK = {"xla_backend_optimization_level": 0}
"""XLA's optimisations are half of the time to compile, and what is compiled here runs a few times."""

CLASSIFIER_STEPS = 4
GROUPS = 512
"""Independent estimates of the energy score."""


def updates_tokenizer(config: Config, batch: Mapping[str, Any]) -> Outcome:
    """Run an update of the tokenizer: the weighted terms must sum to the loss."""
    loss = config.tokenizer.loss
    weights = {name: getattr(loss, name) for name in ("l1", "l2", "wavelet", "gaussian", "kl", "commitment")}
    weights |= {"quantiser": 1.0}
    create: Callable[[Any], Any] = lambda keys: build.build_tokenizer_objective(config, rngs=keys)  # noqa: E731
    return _updates(create, config.tokenizer_training, batch, weights)


def updates_generator(config: Config, spec: TokenizerSpec, batch: Mapping[str, Any]) -> Outcome:
    """Run an update of the generator on tokens: the weighted levels must sum to the loss."""
    create: Callable[[Any], Any] = lambda keys: build.build_generator(config, spec, CLASSES, rngs=keys)  # noqa: E731
    generator = build.abstract_generator(config, spec, CLASSES)
    return _updates(create, config.generator_training, batch, generator.loss_weights, generator.group)


def _updates(
    create: Callable[[Any], Any],
    training: TrainingConfig,
    batch: Mapping[str, Any],
    weights: Mapping[str, float],
    group: Callable[[str], Group] = usual_group,
) -> Outcome:
    static, parameters, rest = random_weights(create)
    recipe = resolve(training, stage_lengths(training, BATCH_SIZE))
    optimizer = make_optimizer(recipe, group)
    options = QUICK if jax.default_backend() == "cpu" else None
    step = jax.jit(make_train_step(static, optimizer, recipe), compiler_options=options)
    before = create_state(parameters, rest, optimizer)
    after, metrics = step(before, batch, jax.random.key(0))
    again, repeated = step(before, batch, jax.random.key(0))
    values = {name: float(value) for name, value in metrics.items()}
    faults = [f"{name} is {value} after one update." for name, value in values.items() if not np.isfinite(value)]
    if values["nonfinite_total"]:
        faults.append("the update was skipped: loss or gradient is not finite.")
    if float(repeated["loss"]) != values["loss"] or not _equal(after["params"], again["params"]):
        faults.append("the same update from the same state gives other weights.")
    moved = {name: float(jnp.abs(after["params"][name] - leaf).max()) for name, leaf in before["params"].items()}
    still = sorted({_group(name) for name in moved} - {_group(name) for name, change in moved.items() if change > 0})
    faults += [f"{group} did not move." for group in still]
    name = max(moved, key=lambda name: moved[name])
    kept = recipe.ema_decay * before["ema"][name] + (1 - recipe.ema_decay) * after["params"][name]
    if plausibility.largest_difference(np.asarray(kept), np.asarray(after["ema"][name])) > 1e-6:
        faults.append("the averaged weights are not the average that ema_decay says.")
    parts = {term: weight * values[f"loss/{term}"] for term, weight in weights.items() if f"loss/{term}" in values}
    if parts:
        faults += plausibility.sum_faults("loss", parts, values["loss"])
    terms = f" = {' + '.join(parts)}" if len(parts) > 1 else ""
    return Outcome(f"loss {values['loss']:.3f}{terms}; {len(moved)} arrays", faults)


def scores_energy_without_bias(config: Config) -> Outcome:
    """Compare the head's training loss with few draws with the energy score of all of them."""
    spec = build.abstract_tokenizer(config).spec
    level, generator = kinds.levels(config)[-1], config.generator
    module = build.abstract_generator(config, spec, CLASSES)
    if not any(isinstance(part, EnergyHead) for _, part in nnx.iter_modules(module)):
        return Outcome("no energy head in this configuration")
    stream, seen, faults = np.random.default_rng(0), [], []
    width, alpha = generator.backbone.width, generator.energy.alpha
    hidden = jnp.asarray(stream.normal(size=(1, 1, width)), jnp.float32)
    target = jnp.asarray(stream.normal(size=(1, 1, level.size)), jnp.float32)
    for count in sorted({2, 4, generator.energy.samples}):
        own = dataclasses.replace(generator.energy, samples=count, repeats=1)
        chosen = dataclasses.replace(generator, energy=own)
        static, *arrays = random_weights(lambda keys, c=chosen: build.HEADS["energy"](c, level, jnp.float32, keys))
        shape = (GROUPS, count, 1, 1, own.noise_channels)
        noise = jnp.asarray(stream.uniform(-0.5, 0.5, shape), jnp.float32)

        @jax.jit
        def run(arrays: Any, noise: jax.Array, static: Any = static) -> tuple[jax.Array, jax.Array]:
            head = static.merge(*arrays)
            mask = jnp.ones((1, 1), bool)
            losses = jax.lax.map(lambda group: head.loss_at(hidden, target, mask, group)[0], noise)
            flat = noise.reshape(-1, 1, 1, noise.shape[-1])
            projected = head.project(hidden)
            return losses, head.draw(jnp.broadcast_to(projected, (len(flat), *projected.shape)), flat)

        losses, draws = map(np.asarray, run(arrays, noise))
        truth = 2.0 * energy_score(draws[:, 0], np.asarray(target)[0], beta=alpha).item()
        faults += plausibility.bias_faults(f"energy loss of {count} draws", losses, truth)
        seen.append(f"m={count}: {losses.mean():.3f} of {truth:.3f}")
    return Outcome(", ".join(seen), faults)


def trains_judge(config: Config, source: SplitSource, keep: Callable[[ClassifierFeatures], None]) -> Outcome:
    """Train the judging classifier for a few updates: features finite, and not the same for different images."""
    classes = len(source.class_names)
    loader = Loader(source, batch_size=BATCH_SIZE, seed=config.seed, decode_threads=1)
    try:
        trained = train_classifier(
            loader, classes, steps=CLASSIFIER_STEPS, channels=4, seed=config.seed, image_px=config.data.image_px
        )
    finally:
        loader.close()
    network = ClassifierFeatures(trained, batch_size=len(source))
    images = source.batch(np.arange(len(source)), np.zeros(len(source), bool))["image"]
    features = network.features(images)
    keep(network)
    return Outcome(
        f"{network.width} features of {len(images)} images", plausibility.identical_faults("rows of features", features)
    )


def scores_sets(network: ClassifierFeatures, real: Mapping[str, Any], samples: np.ndarray, ids: np.ndarray) -> Outcome:
    """Score the real images against themselves, and samples: a distance of 0, everything finite, parts that sum."""
    features = statistics_of(network.features(real["image"]))
    same = frechet_distance(features, features).value
    scale = float(np.trace(features.covariance))
    faults = [] if same <= 1e-6 * scale else [f"the Fréchet distance of identical sets is {same:.3g}; expected 0."]
    reference = reference_moments(network, [ImageBatch(real["image"], real["label"])], source="check")
    scorer = SampleScorer(network, reference)
    scorer.update(ImageBatch(samples, ids))
    scores = scorer.scores()
    faults += [f"{name} is {value}." for name, value in scores.values.items() if not np.isfinite(value)]
    counts = {label: int((ids == label).sum()) for label in scores.by_class}
    faults += plausibility.accuracy_faults("accuracy", scores.by_class, counts, scores.values["class_accuracy"])
    if scores.values["fd_classifier"] <= same:
        faults.append("samples of random weights are as close to the real images as these are to themselves.")
    return Outcome(f"FD of identical sets {same:.1g}, {len(scores.values)} other numbers", faults)


def scores_reconstructions(network: ClassifierFeatures, real: Mapping[str, Any], decoded: np.ndarray) -> Outcome:
    """Score images against themselves, which must be perfect, and against what the tokenizer makes of them."""
    originals = np.asarray(real["image"])
    perfect, found = (
        _reconstruction_scores(network, originals, images, real["label"]) for images in (originals, decoded)
    )
    faults = [f"{name} is {value}." for name, value in found.items() if not np.isfinite(value)]
    if perfect["psnr"] < 100.0 or abs(perfect["ssim"] - 1.0) > 1e-4:
        faults.append(f"images against themselves: PSNR {perfect['psnr']:.1f} dB, SSIM {perfect['ssim']:.4f}.")
    if found["psnr"] >= perfect["psnr"]:
        faults.append("random weights reconstruct perfectly.")
    return Outcome(f"PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.2f}", faults)


def _reconstruction_scores(network: Any, originals: Any, images: Any, labels: Any) -> dict[str, float]:
    scorer = ReconstructionScorer(network)
    scorer.update(Reconstructions(originals, images, labels))
    return scorer.scores().values


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes() for name in first)


def _group(name: str) -> str:
    """Return the part of a model that an array is in: two words of its path."""
    return "/".join(name.split("/")[:2])
