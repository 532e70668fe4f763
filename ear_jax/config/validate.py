"""What keys imply for each other: every fault of a config whose values are each fine by themselves.

Faults name the keys they rest on, so that a key already known to be wrong does not cause a second complaint.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from ear_jax.config import derive, kinds
from ear_jax.config.kinds import Fault
from ear_jax.config.schema import SAMPLE_METRICS, Config, TrainingConfig
from ear_jax.config.suggest import did_you_mean


def cross_faults(config: Config) -> list[Fault]:
    """Return every contradiction between keys; an empty list means the config is sound."""
    return [
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


def _general(config: Config) -> Iterator[Fault]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name):
        yield Fault(
            f"config.name={config.name!r} must be letters, digits, '_', '-' and '.', as it names folders.", ("name",)
        )
    for path, seed in (("seed", config.seed), ("sample.seed", config.sample.seed)):
        if seed >= 2**32:
            yield Fault(f"config.{path}={seed} is out of range, expected less than 2**32.", (path,))


def _data(config: Config) -> Iterator[Fault]:
    data, shapes = config.data, config.data.shapes
    prefix, _, rest = data.source.partition(":")
    if prefix not in ("shapes", "folder", "tfds"):
        hint = did_you_mean(prefix, ("shapes", "folder", "tfds"))
        yield Fault(
            f"config.data.source={data.source!r} is not a source. Known: shapes, folder:PATH, tfds:NAME.{hint}",
            ("data.source",),
        )
    elif prefix == "shapes" and ":" in data.source:
        yield Fault(f"config.data.source={data.source!r}: shapes takes no argument; write 'shapes'.", ("data.source",))
    elif prefix != "shapes" and not rest.strip():
        what = "PATH" if prefix == "folder" else "NAME"
        yield Fault(f"config.data.source={data.source!r} lacks its {what}; write '{prefix}:{what}'.", ("data.source",))
    if shapes.size_low > shapes.size_high:
        yield Fault(
            f"config.data.shapes.size_low={shapes.size_low} is above config.data.shapes.size_high={shapes.size_high}; "
            "swap them.",
            ("data.shapes.size_low", "data.shapes.size_high"),
        )
    if data.max_pixels < data.image_px**2:
        yield Fault(
            f"config.data.max_pixels={data.max_pixels} is less than one image of {data.image_px} px a side; raise it.",
            ("data.max_pixels", "data.image_px"),
        )
    if config.latents.source and not config.latents.source.partition("latents:")[2].strip():
        yield Fault(
            f"config.latents.source={config.latents.source!r} is not a cache of tokens; write 'latents:PATH' or leave "
            "it empty for WORKDIR/latents.",
            ("latents.source",),
        )


def _tokenizer(config: Config) -> Iterator[Fault]:
    data, path = config.data, derive.downsampling_path(config)
    factor = derive.downsampling(config)
    grid_paths = ("data.image_px", path)
    if data.image_px % factor:
        fitting = max(factor, data.image_px // factor * factor)
        why = (
            "2**config.tokenizer.vae.wavelet_levels" if config.tokenizer.name in derive.LITE else f"what config.{path}"
        )
        yield Fault(
            f"config.data.image_px={data.image_px} is not a multiple of {factor} = {why}"
            + (
                f"; use {fitting} px or fewer wavelet levels."
                if config.tokenizer.name in derive.LITE
                else f" halves; use {fitting} px or fewer multipliers."
            ),
            grid_paths,
        )
    if config.tokenizer.name in derive.LITE:
        yield from _lite(config)
    else:
        yield from _published(config)
    if derive.has_coarse(config) and not data.image_px % factor:
        yield from _hybrid(config, grid_paths)


def _lite(config: Config) -> Iterator[Fault]:
    vae = config.tokenizer.vae
    decoder_levels = vae.wavelet_levels + (vae.decoder_output == "image")
    if len(vae.decoder_multipliers) != decoder_levels:
        yield Fault(
            f"config.tokenizer.vae.decoder_multipliers={_tuple(vae.decoder_multipliers)} has "
            f"{len(vae.decoder_multipliers)} entries, expected {decoder_levels}: one for each of the "
            f"{vae.wavelet_levels} wavelet levels, and one more with decoder_output='image'.",
            ("tokenizer.vae.decoder_multipliers", "tokenizer.vae.wavelet_levels", "tokenizer.vae.decoder_output"),
        )
    for path, multipliers in (
        ("tokenizer.vae.encoder_multipliers", vae.encoder_multipliers),
        ("tokenizer.vae.decoder_multipliers", vae.decoder_multipliers),
        ("tokenizer.fine.multipliers", config.tokenizer.fine.multipliers),
    ):
        yield from _multipliers(path, multipliers)
    if any(vae.decoder_channels * multiplier % vae.conv_groups for multiplier in vae.decoder_multipliers):
        yield Fault(
            f"config.tokenizer.vae.conv_groups={vae.conv_groups} does not divide every decoder width "
            f"(decoder_channels={vae.decoder_channels} times {_tuple(vae.decoder_multipliers)}).",
            ("tokenizer.vae.conv_groups", "tokenizer.vae.decoder_channels", "tokenizer.vae.decoder_multipliers"),
        )


def _published(config: Config) -> Iterator[Fault]:
    tokenizer = config.tokenizer
    group = "kl_vae" if tokenizer.name == "kl_vae" else "vqvae"
    own = getattr(tokenizer, group)
    yield from _multipliers(f"tokenizer.{group}.multipliers", own.multipliers)
    if group == "vqvae":
        path, latent = "tokenizer.vqvae.scales", derive.latent_grid(config)
        paths = (path, "data.image_px", "tokenizer.vqvae.multipliers")
        if not own.scales or not _increase(own.scales):
            yield Fault(f"config.{path}={_tuple(own.scales)} must be positive and increase.", (path,))
        elif own.scales[-1] != latent:
            yield Fault(
                f"config.{path}={_tuple(own.scales)} ends at {own.scales[-1]}, but the latent grid is {latent} "
                f"({config.data.image_px} px / {derive.downsampling(config)}); the last scale must be the whole grid.",
                paths,
            )


def _multipliers(path: str, multipliers: tuple[int, ...]) -> Iterator[Fault]:
    if not multipliers or min(multipliers) < 1:
        yield Fault(f"config.{path}={_tuple(multipliers)} must hold one or more integers >= 1.", (path,))


def _hybrid(config: Config, grid_paths: tuple[str, ...]) -> Iterator[Fault]:
    grids, latent = config.tokenizer.coarse.grids, derive.latent_grid(config)
    path = "tokenizer.coarse.grids"
    name = f"config.{path}={_tuple(grids)}"
    if not grids:
        yield Fault(f"{name} is empty; give at least one grid, or use config.tokenizer.name=lite_vae.", (path,))
    elif not _increase(grids):
        yield Fault(f"{name} must be positive and increase from coarsest to finest.", (path,))
    elif any(latent % grid for grid in grids):
        divisors = ", ".join(str(side) for side in range(1, latent + 1) if latent % side == 0)
        yield Fault(
            f"{name} does not divide the latent grid of {latent} ({config.data.image_px} px / "
            f"{derive.downsampling(config)}); use {divisors}.",
            (path, *grid_paths),
        )
    halvings = len(config.tokenizer.fine.multipliers) - 1
    if halvings > 0 and latent % 2**halvings:
        yield Fault(
            f"config.tokenizer.fine.multipliers={_tuple(config.tokenizer.fine.multipliers)} halves the latent grid of "
            f"{latent} {halvings} times, which does not come out even; use fewer entries.",
            ("tokenizer.fine.multipliers", *grid_paths),
        )


def _tokenizer_loss(config: Config) -> Iterator[Fault]:
    loss = config.tokenizer.loss
    if loss.lpips > 0 and not loss.vgg_weights:
        yield Fault(
            f"config.tokenizer.loss.lpips={loss.lpips} needs config.tokenizer.loss.vgg_weights=FILE; "
            "give it or set lpips=0.",
            ("tokenizer.loss.lpips", "tokenizer.loss.vgg_weights"),
        )
    if loss.adversarial == 0:
        for word in ("r1", "lecam"):
            if getattr(loss, word) > 0:
                yield Fault(
                    f"config.tokenizer.loss.{word}={getattr(loss, word)} regularises a discriminator that is not "
                    f"there; set config.tokenizer.loss.adversarial > 0 or {word}=0.",
                    (f"tokenizer.loss.{word}", "tokenizer.loss.adversarial"),
                )
    if not any((loss.l1, loss.l2, loss.lpips)):
        yield Fault(
            "config.tokenizer.loss has no reconstruction term: l1, l2 and lpips are all 0; set one.",
            ("tokenizer.loss.l1", "tokenizer.loss.l2", "tokenizer.loss.lpips"),
        )


def _tokenizer_phases(config: Config) -> Iterator[Fault]:
    # A phase that starts after the end would leave an untrained part in the model without a word.
    end = config.tokenizer_training.steps
    starts = {}
    if derive.has_coarse(config):
        starts["tokenizer.hybrid_start_steps"] = config.tokenizer.hybrid_start_steps
    if config.tokenizer.loss.adversarial > 0:
        starts["tokenizer.loss.adversarial_start_steps"] = config.tokenizer.loss.adversarial_start_steps
    for path, start in starts.items():
        if end and start >= end:
            yield Fault(
                f"config.{path}={start} is not before the end of the run (config.tokenizer_training.steps={end}); "
                f"lower it, to {end // 2} for example.",
                (path, "tokenizer_training.steps"),
            )


def _generator(config: Config) -> Iterator[Fault]:
    backbone, patch = config.generator.backbone, config.generator.patch_size
    if backbone.width % backbone.heads:
        yield Fault(
            f"config.generator.backbone.width={backbone.width} is not a multiple of "
            f"config.generator.backbone.heads={backbone.heads}.",
            ("generator.backbone.width", "generator.backbone.heads"),
        )
    latent = derive.latent_grid(config)
    grid_paths = ("data.image_px", derive.downsampling_path(config), "generator.patch_size")
    if latent < 1 or (latent % patch and derive.has_continuous(config)):
        yield Fault(
            f"config.generator.patch_size={patch} does not divide the latent grid of {latent} "
            f"({config.data.image_px} px / {derive.downsampling(config)}).",
            grid_paths,
        )
        return
    kind = kinds.kind_of(config)
    yield from kind.faults(config)
    steps, trained = config.generator.diffusion.sample_steps, config.generator.diffusion.train_steps
    if steps > trained:
        yield Fault(
            f"config.generator.diffusion.sample_steps={steps} is more than train_steps={trained}.",
            ("generator.diffusion.sample_steps", "generator.diffusion.train_steps"),
        )
    level_paths = (*grid_paths, "tokenizer.coarse.grids", "tokenizer.name", "generator.backbone.name")
    grids = derive.coarse_grids(config)
    wanted = []
    if derive.has_continuous(config):
        fine = kind.most_steps(config, kind.levels(config)[-1])
        wanted += [
            ("generator.fine.steps", config.generator.fine.steps, fine),
            ("sample.fine_steps", config.sample.fine_steps, fine),
        ]
    if derive.has_coarse(config) and grids and _increase(grids):
        coarse = min(grids) ** 2
        wanted += [
            ("generator.coarse.steps", config.generator.coarse.steps, coarse),
            ("sample.coarse_steps", config.sample.coarse_steps, coarse),
        ]
    for path, steps, limit in wanted:
        if steps > max(limit, 1):
            yield Fault(
                f"config.{path}={steps} is more than the level's {limit} {kind.steps_of}; use at most {limit}.",
                (path, *level_paths),
            )
    for level in ("coarse", "fine"):
        plan = getattr(config.generator, level)
        if plan.mask_ratio == "truncated_normal" and plan.mask_ratio_low >= 1:
            path = f"generator.{level}.mask_ratio_low"
            yield Fault(f"config.{path}={plan.mask_ratio_low} leaves nothing to draw from; use less than 1.", (path,))


def _training(group: str, training: TrainingConfig) -> Iterator[Fault]:
    if training.batch_size % training.accumulation_steps:
        yield Fault(
            f"config.{group}.batch_size={training.batch_size} is not a multiple of "
            f"config.{group}.accumulation_steps={training.accumulation_steps}.",
            (f"{group}.batch_size", f"{group}.accumulation_steps"),
        )
    for prefix, needed in (("", True), ("warmup_", False), ("final_phase_", False)):
        paths = (f"{group}.{prefix}epochs", f"{group}.{prefix}steps")
        epochs, steps = (getattr(training, f"{prefix}{unit}") for unit in ("epochs", "steps"))
        if epochs and steps:
            yield Fault(
                f"config.{paths[0]}={epochs:g} and config.{paths[1]}={steps} are both set; "
                "set the one you do not mean to 0.",
                paths,
            )
        elif needed and not epochs and not steps:
            yield Fault(f"config.{group} has no length; set config.{paths[0]} or config.{paths[1]}.", paths)
    for phase in ("warmup", "final_phase"):
        for unit in ("epochs", "steps"):
            length, total = getattr(training, f"{phase}_{unit}"), getattr(training, unit)
            if total and length > total:
                yield Fault(
                    f"config.{group}.{phase}_{unit}={length:g} is longer than the run "
                    f"(config.{group}.{unit}={total:g}).",
                    (f"{group}.{phase}_{unit}", f"{group}.{unit}"),
                )


def _sampling(config: Config) -> Iterator[Fault]:
    labels = config.sample.labels
    if labels and min(labels) < 0:
        yield Fault(
            f"config.sample.labels={_tuple(labels)} holds negative class ids; ids start at 0.", ("sample.labels",)
        )
    elif labels and config.data.source == "shapes" and max(labels) >= config.data.shapes.classes:
        yield Fault(
            f"config.sample.labels={_tuple(labels)} goes beyond the {config.data.shapes.classes} classes of the data; "
            f"use 0 to {config.data.shapes.classes - 1}.",
            ("sample.labels", "data.source", "data.shapes.classes"),
        )


def _evaluation(config: Config) -> Iterator[Fault]:
    settings = config.evaluate
    names = [name.strip() for name in settings.metrics.split(",")]
    known = ("all", *SAMPLE_METRICS)
    for name in names:
        if name not in known:
            yield Fault(
                f"config.evaluate.metrics={settings.metrics!r}: {name!r} is not measured. "
                f"Known: {', '.join(known)}.{did_you_mean(name, known)}",
                ("evaluate.metrics",),
            )
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", config.stats.name):
        yield Fault(
            f"config.stats.name={config.stats.name!r} must be letters, digits, '_', '-' and '.', as it names a file.",
            ("stats.name",),
        )


def _mesh(config: Config) -> Iterator[Fault]:
    sides = dataclasses.asdict(config.mesh)
    paths = tuple(f"mesh.{name}" for name in sides)
    for name, side in sides.items():
        if side == 0:
            yield Fault(
                f"config.mesh.{name}=0 leaves no device; use 1 or more, or -1 for all that are left.", (f"mesh.{name}",)
            )
    if list(sides.values()).count(-1) > 1:
        yield Fault("config.mesh: only one of data, fsdp and tensor can be -1 (all that are left).", paths)


def _increase(grids: tuple[int, ...]) -> bool:
    return min(grids) >= 1 and all(left < right for left, right in itertools.pairwise(grids))


def _tuple(values: tuple[int, ...]) -> str:
    return f"({','.join(map(str, values))})"
