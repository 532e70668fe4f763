"""What keys imply for each other: every fault of a config whose values are each fine by themselves.

Faults rest on the keys that they name, so that a key already known to be wrong does not cause a second complaint.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from ear_jax.config import derive, kinds
from ear_jax.config.kinds import Fault, fault
from ear_jax.config.schema import SAMPLE_METRICS, Config, TrainingConfig
from ear_jax.config.suggest import did_you_mean
from ear_jax.errors import ConfigError
from ear_jax.sampling import seed_number


def cross_faults(config: Config) -> list[Fault]:
    """Return every contradiction between keys; an empty list means the config is sound."""
    found = [
        *_general(config),
        *_data(config),
        *_tokenizer(config),
        *_tokenizer_loss(config),
        *_generator(config),
        *_training("tokenizer_training", config.tokenizer_training),
        *_training("generator_training", config.generator_training),
        *_tokenizer_phases(config),
        *_sampling(config),
        *_evaluation(config),
        *_mesh(config),
    ]
    return found or list(_drawn(config))


def _general(config: Config) -> Iterator[Fault]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name):
        yield fault(f"config.name={config.name!r} must be letters, digits, '_', '-' and '.', as it names folders.")
    several = [(f"study.seeds[{i}]", seed) for i, seed in enumerate(config.study.seeds)]
    for path, seed in (("seed", config.seed), ("sample.seed", config.sample.seed), *several):
        try:
            seed_number(f"config.{path}", seed)
        except ConfigError as error:
            yield fault(str(error))

    steps = config.run.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield fault(
            f"config.run.profile_steps={steps} must be the first and the last step to trace, such as (10,12), counted "
            "from 1; leave it empty for no trace."
        )


def _data(config: Config) -> Iterator[Fault]:
    data, shapes = config.data, config.data.shapes
    prefix, _, rest = data.source.partition(":")
    if prefix not in ("shapes", "folder", "tfds"):
        hint = did_you_mean(prefix, ("shapes", "folder", "tfds"))
        yield fault(f"config.data.source={data.source!r} is not a source. Known: shapes, folder:PATH, tfds:NAME.{hint}")
    elif prefix == "shapes" and ":" in data.source:
        yield fault(f"config.data.source={data.source!r}: shapes takes no argument; write 'shapes'.")
    elif prefix != "shapes" and not rest.strip():
        what = "PATH" if prefix == "folder" else "NAME"
        yield fault(f"config.data.source={data.source!r} lacks its {what}; write '{prefix}:{what}'.")
    if shapes.size_low > shapes.size_high:
        yield fault(
            f"config.data.shapes.size_low={shapes.size_low} is above config.data.shapes.size_high={shapes.size_high}; "
            "swap them."
        )
    if data.max_pixels < data.image_px**2:
        yield fault(
            f"config.data.max_pixels={data.max_pixels} is less than one image of {data.image_px} px a side; raise it.",
            "data.image_px",
        )
    if config.latents.source and not config.latents.source.partition("latents:")[2].strip():
        yield fault(
            f"config.latents.source={config.latents.source!r} is not a cache of tokens; write 'latents:PATH' or leave "
            "it empty for WORKDIR/latents."
        )


def _tokenizer(config: Config) -> Iterator[Fault]:
    px, factor, path = config.data.image_px, derive.downsampling(config), derive.downsampling_path(config)
    is_lite = config.tokenizer.name in derive.LITE
    if px % factor:
        fitting = max(factor, px // factor * factor)
        why = f"2**config.{path}" if is_lite else f"what config.{path} halves"
        fewer = "wavelet levels" if is_lite else "multipliers"
        yield fault(
            f"config.data.image_px={px} is not a multiple of {factor} = {why}; use {fitting} px or fewer {fewer}."
        )
    yield from _lite(config) if is_lite else _published(config)
    if derive.has_coarse(config) and not px % factor:
        yield from _hybrid(config)


def _lite(config: Config) -> Iterator[Fault]:
    vae = config.tokenizer.vae
    decoder_levels = vae.wavelet_levels + (vae.decoder_output == "image")
    if len(vae.decoder_multipliers) != decoder_levels:
        yield fault(
            f"config.tokenizer.vae.decoder_multipliers={_tuple(vae.decoder_multipliers)} has "
            f"{len(vae.decoder_multipliers)} entries, expected {decoder_levels}: one for each of the "
            f"{vae.wavelet_levels} wavelet levels, and one more with decoder_output='image'.",
            "tokenizer.vae.wavelet_levels",
            "tokenizer.vae.decoder_output",
        )
    yield from _multipliers("tokenizer.vae.encoder_multipliers", vae.encoder_multipliers)
    yield from _multipliers("tokenizer.vae.decoder_multipliers", vae.decoder_multipliers)
    yield from _multipliers("tokenizer.fine.multipliers", config.tokenizer.fine.multipliers)
    if any(vae.decoder_channels * multiplier % vae.conv_groups for multiplier in vae.decoder_multipliers):
        yield fault(
            f"config.tokenizer.vae.conv_groups={vae.conv_groups} does not divide every decoder width "
            f"(decoder_channels={vae.decoder_channels} times {_tuple(vae.decoder_multipliers)}).",
            "tokenizer.vae.decoder_channels",
            "tokenizer.vae.decoder_multipliers",
        )


def _published(config: Config) -> Iterator[Fault]:
    tokenizer = config.tokenizer
    yield from _multipliers(derive.downsampling_path(config), derive.published(config).multipliers)
    if tokenizer.name == "hart" and not tokenizer.vqvae.use_codebook:
        yield fault(
            "config.tokenizer.vqvae.use_codebook=False leaves config.tokenizer.name=hart no ids in front of its "
            "residual; use config.tokenizer.name=vqvae for the whole latent as one continuous level."
        )
    elif derive.has_scales(config):
        scales, latent = tokenizer.vqvae.scales, derive.latent_grid(config)
        shown = f"config.tokenizer.vqvae.scales={_tuple(scales)}"
        if not scales or not _increase(scales):
            yield fault(f"{shown} must be positive and increase.")
        elif scales[-1] != latent:
            yield fault(
                f"{shown} ends at {scales[-1]}, but the latent grid is {_latent(config)}; "
                "the last scale must be the whole grid.",
                *_latent_paths(config),
            )


def _multipliers(path: str, multipliers: tuple[int, ...]) -> Iterator[Fault]:
    if not multipliers or min(multipliers) < 1:
        yield fault(f"config.{path}={_tuple(multipliers)} must hold one or more integers >= 1.")


def _hybrid(config: Config) -> Iterator[Fault]:
    grids, latent = config.tokenizer.coarse.grids, derive.latent_grid(config)
    shown = f"config.tokenizer.coarse.grids={_tuple(grids)}"
    if not grids:
        yield fault(f"{shown} is empty; give at least one grid, or use config.tokenizer.name=lite_vae.")
    elif not _increase(grids):
        yield fault(f"{shown} must be positive and increase from coarsest to finest.")
    elif any(latent % grid for grid in grids):
        divisors = ", ".join(str(side) for side in range(1, latent + 1) if latent % side == 0)
        yield fault(
            f"{shown} does not divide the latent grid of {_latent(config)}; use {divisors}.", *_latent_paths(config)
        )
    multipliers = config.tokenizer.fine.multipliers
    halvings = len(multipliers) - 1
    if halvings > 0 and latent % 2**halvings:
        yield fault(
            f"config.tokenizer.fine.multipliers={_tuple(multipliers)} halves the latent grid of "
            f"{latent} {halvings} times, which does not come out even; use fewer entries.",
            *_latent_paths(config),
        )


def _tokenizer_loss(config: Config) -> Iterator[Fault]:
    loss = config.tokenizer.loss
    if loss.lpips > 0 and not loss.vgg_weights:
        yield fault(
            f"config.tokenizer.loss.lpips={loss.lpips} needs config.tokenizer.loss.vgg_weights=FILE; "
            "give it or set lpips=0."
        )
    for word in ("r1", "lecam"):
        if loss.adversarial == 0 and getattr(loss, word) > 0:
            yield fault(
                f"config.tokenizer.loss.{word}={getattr(loss, word)} regularises a discriminator that is not "
                f"there; set config.tokenizer.loss.adversarial > 0 or {word}=0."
            )
    if not any((loss.l1, loss.l2, loss.lpips, loss.perceptual)):
        yield fault(
            "config.tokenizer.loss has no reconstruction term: l1, l2, lpips and perceptual are all 0; set one.",
            *(f"tokenizer.loss.{term}" for term in ("l1", "l2", "lpips", "perceptual")),
        )


def _tokenizer_phases(config: Config) -> Iterator[Fault]:
    # A phase that starts after the end would leave an untrained part in the model without a word.
    end, tokenizer = config.tokenizer_training.steps, config.tokenizer
    for path, is_used, start in (
        ("hybrid_start_steps", derive.has_coarse(config), tokenizer.hybrid_start_steps),
        ("loss.adversarial_start_steps", tokenizer.loss.adversarial > 0, tokenizer.loss.adversarial_start_steps),
    ):
        if is_used and end and start >= end:
            yield fault(
                f"config.tokenizer.{path}={start} is not before the end of the run "
                f"(config.tokenizer_training.steps={end}); lower it, to {end // 2} for example."
            )


def _generator(config: Config) -> Iterator[Fault]:
    generator, patch, latent = config.generator, config.generator.patch_size, derive.latent_grid(config)
    backbone, diffusion = generator.backbone, generator.diffusion
    yield from _multiple("generator.backbone.width", backbone.width, "generator.backbone.heads", backbone.heads)
    if latent < 1 or (latent % patch and derive.has_continuous(config)):
        yield fault(
            f"config.generator.patch_size={patch} does not divide the latent grid of {_latent(config)}.",
            *_latent_paths(config),
        )
        return
    kind = kinds.kind_of(config)
    yield from kind.faults(config)
    if generator.freeze and not generator.start_from:
        yield fault(
            f"config.generator.freeze={','.join(generator.freeze)} would freeze random weights; give "
            "config.generator.start_from=MODEL, or leave it out."
        )
    copies = generator.aggregate.streams
    if copies > 1 and "sample.aggregate" not in kind.options:
        able = " or ".join(name for name, other in kinds.KINDS.items() if "sample.aggregate" in other.options)
        yield fault(
            f"config.generator.aggregate.streams={copies} is not for config.generator.backbone.name={backbone.name}, "
            f"only for {able}; leave it at 1."
        )
    if diffusion.sample_steps > diffusion.train_steps:
        yield fault(
            f"config.generator.diffusion.sample_steps={diffusion.sample_steps} is more than "
            f"train_steps={diffusion.train_steps}.",
            "generator.diffusion.train_steps",
        )
    grids, most = derive.coarse_grids(config), {}
    if derive.has_continuous(config):
        most["fine"] = kind.most_steps(config, kind.levels(config)[-1])
    if derive.has_coarse(config) and grids and _increase(grids):
        most["coarse"] = min(grids) ** 2
    for level, limit in most.items():
        own, asked = getattr(generator, level).steps, getattr(config.sample, f"{level}_steps")
        for path, steps in ((f"generator.{level}.steps", own), (f"sample.{level}_steps", asked)):
            if steps > max(limit, 1):
                yield fault(
                    f"config.{path}={steps} is more than the level's {limit} {kind.steps_of}; use at most {limit}.",
                    *_latent_paths(config),
                    "generator.patch_size",
                    "tokenizer.coarse.grids",
                    "tokenizer.name",
                    "generator.backbone.name",
                )
    limits = generator.spread_limits
    if limits and not (len(limits) == 2 and limits[0] < 1 < limits[1]):
        yield fault(
            f"config.generator.spread_limits={_tuple(limits)} must be two numbers with 1 between them, such as "
            "(0.8,1.25); leave it empty for no warning."
        )
    for level in ("coarse", "fine"):
        plan = getattr(generator, level)
        if plan.mask_ratio == "truncated_normal" and plan.mask_ratio_low >= 1:
            shown = f"config.generator.{level}.mask_ratio_low={plan.mask_ratio_low}"
            yield fault(f"{shown} leaves nothing to draw from; use less than 1.")


def _training(group: str, training: TrainingConfig) -> Iterator[Fault]:
    accumulation = training.accumulation_steps
    yield from _multiple(f"{group}.batch_size", training.batch_size, f"{group}.accumulation_steps", accumulation)
    for prefix in ("", "warmup_", "final_phase_"):
        paths = f"config.{group}.{prefix}epochs", f"config.{group}.{prefix}steps"
        epochs, steps = (getattr(training, f"{prefix}{unit}") for unit in ("epochs", "steps"))
        if epochs and steps:
            yield fault(f"{paths[0]}={epochs:g} and {paths[1]}={steps} are both set; set the one you do not mean to 0.")
        elif not (prefix or epochs or steps):
            yield fault(f"config.{group} has no length; set {paths[0]} or {paths[1]}.")
    for phase, unit in itertools.product(("warmup", "final_phase"), ("epochs", "steps")):
        length, total = getattr(training, f"{phase}_{unit}"), getattr(training, unit)
        if total and length > total:
            yield fault(
                f"config.{group}.{phase}_{unit}={length:g} is longer than the run (config.{group}.{unit}={total:g})."
            )


def _sampling(config: Config) -> Iterator[Fault]:
    labels, classes = config.sample.labels, config.data.shapes.classes
    shown, ids = f"config.sample.labels={_tuple(labels)}", [label for label in labels if isinstance(label, int)]
    if "" in labels:
        yield fault(f"{shown} holds an empty name; write ids or names such as (1,star).")
    if ids and min(ids) < 0:
        yield fault(f"{shown} holds negative class ids; ids start at 0.")
    elif ids and config.data.source == "shapes" and max(ids) >= classes:
        yield fault(
            f"{shown} goes beyond the {classes} classes of the data; use 0 to {classes - 1}.",
            "data.source",
            "data.shapes.classes",
        )


def _drawn(config: Config) -> Iterator[Fault]:
    # Only of a sound configuration can be told how it draws.
    try:
        kinds.sampling_of(config)
    except ConfigError as error:
        yield fault(f"config.sample.{error}", "generator.backbone.name", "generator.pyramid.scales")


def _evaluation(config: Config) -> Iterator[Fault]:
    metrics, known = config.evaluate.metrics, ("all", *SAMPLE_METRICS)
    for name in (name.strip() for name in metrics.split(",")):
        if name not in known:
            yield fault(
                f"config.evaluate.metrics={metrics!r}: {name!r} is not measured. "
                f"Known: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", config.stats.name):
        yield fault(
            f"config.stats.name={config.stats.name!r} must be letters, digits, '_', '-' and '.', as it names a file."
        )


def _mesh(config: Config) -> Iterator[Fault]:
    sides = dataclasses.asdict(config.mesh)
    for name, side in sides.items():
        if side == 0:
            yield fault(f"config.mesh.{name}=0 leaves no device; use 1 or more, or -1 for all that are left.")
    if list(sides.values()).count(-1) > 1:
        yield fault(
            "config.mesh: only one of data, fsdp and tensor can be -1 (all that are left).",
            *(f"mesh.{name}" for name in sides),
        )


def _multiple(path: str, value: int, divisor_path: str, divisor: int) -> Iterator[Fault]:
    if value % divisor:
        yield fault(f"config.{path}={value} is not a multiple of config.{divisor_path}={divisor}.")


def _latent(config: Config) -> str:
    """Return the side of the latent grid and where it comes from, in words."""
    return f"{derive.latent_grid(config)} ({config.data.image_px} px / {derive.downsampling(config)})"


def _latent_paths(config: Config) -> tuple[str, str]:
    """Return the keys that the latent grid rests on."""
    return "data.image_px", derive.downsampling_path(config)


def _increase(grids: tuple[int, ...]) -> bool:
    return min(grids) >= 1 and all(left < right for left, right in itertools.pairwise(grids))


def _tuple(values: tuple[float | str, ...]) -> str:
    return f"({','.join(map(str, values))})"
