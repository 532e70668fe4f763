"""What a call may ask of a finished model: keys of drawing are applied, the others are refused with the reason."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ear_jax.config.kinds import ENERGY_OPTIONS, KINDS, kind_of, levels, sampling_of, too_many_copies
from ear_jax.config.schema import IMAGES, USES, Config
from ear_jax.config.values import flatten, leaves, unflatten
from ear_jax.errors import ConfigError
from ear_jax.sampling import Sampling, as_integer

_MEASURING = ("seed", "data", "evaluate", "stats", "run", "mesh")
"""Keys that scoring images, or statistics of them, reads: no model is drawn from."""

_OTHERS = {"bench": "bench", "convert": "convert", "evaluate.images": "evaluate"}
"""Keys and groups of keys that one task reads and a run does not."""


def drawing(config: Config) -> dict[str, Any]:
    """Return by path what says how a finished model computes and draws, `config.sample` apart."""
    named = flatten(config)
    return {
        path: named[path]
        for path, leaf in leaves().items()
        if not leaf.metadata["is_asked"] and set(USES) <= set(leaf.metadata["read_by"])
    }


def drawn_as(model: Config, config: Config) -> Config:
    """Return the configuration of a finished model that draws as `config` says."""
    return unflatten({**flatten(model), **drawing(config)})


def refusals(task: str, paths: Iterable[str], config: Config, model: Config) -> Iterator[str]:
    """Yield why keys of `config` cannot be given to `task` for a finished model; what it has already is no question."""
    wanted, own, useless = flatten(config), flatten(model), _without_effect(model, vars(config.sample))
    for path in paths:
        if wanted[path] == own[path]:
            continue
        metadata, start = leaves()[path].metadata, f"config.{path}={wanted[path]!r}: "
        asked = f"sample.{path.removeprefix('generator.').removesuffix('.steps')}_steps"
        if path.startswith("generator.") and wanted.get(asked):
            yield f"{start}has no effect beside config.{asked}={wanted[asked]}. Drop one."
        elif path in useless:
            yield f"{start}has no effect on this model: {useless[path]}. Leave it out."
        elif path == "sample.aggregate" and (said := too_many_copies(model, wanted[path])):
            yield f"config.sample.{said}"
        elif task not in metadata["read_by"]:
            readers = [name for name in USES if name in metadata["read_by"]]
            if readers or metadata["is_asked"]:
                others = " or ".join(f"--task={name}" for name in readers) or "another task"
                yield f"{start}--task={task} does not read it, {others} does. Leave it out."
            elif metadata["affects_result"]:
                yield (
                    f"{start}belongs to the weights, which were made with {own[path]!r}; --task={task} cannot change "
                    "it. Leave it out, or train another model with it in another --workdir."
                )
            else:
                yield f"{start}says how training runs, and --task={task} trains nothing. Leave it out."


def refusals_of_images(paths: Iterable[str], config: Config) -> Iterator[str]:
    """Yield why keys cannot be given to the scoring of `config.evaluate.images`; what it has already is no question."""
    wanted = flatten(config)
    for path in paths:
        if IMAGES not in leaves()[path].metadata["read_by"] and wanted[path] != config.once.get(path, wanted[path]):
            yield (
                f"config.{path}={wanted[path]!r}: config.evaluate.images is scored as it is, without a model, and does "
                "not read it. Leave it out."
            )


def idle(paths: Collection[str], config: Config) -> Iterator[str]:
    """Yield why keys cannot be given to a run: its generator does not read them so, or only another task does."""
    wanted, useless = flatten(config), _without_effect(config, vars(config.sample))
    given = [path for path in paths if wanted[path] != config.once.get(path, wanted[path])]
    refused = [path for path in given if path in useless and path.startswith("sample.")]
    if "sample.aggregate" not in refused and (said := too_many_copies(config, config.sample.aggregate)):
        yield f"config.sample.{said}"
    of_copies = {"generator.aggregate.prefix_tokens", "generator.aggregate.smoothing"}
    for path in paths if config.generator.aggregate.streams == 1 else ():
        if path in of_copies:
            yield f"config.{path}={wanted[path]!r}: has no effect, streams=1 is one copy. Raise that."
    for path in given:
        if path in refused:
            yield f"config.{path}={wanted[path]!r}: has no effect on this model: {useless[path]}. Leave it out."
        task = _OTHERS.get(path, _OTHERS.get(path.partition(".")[0]))
        if task:
            yield f"config.{path}={wanted[path]!r}: --task=run does not read it, --task={task} does. Leave it out."


def sampling_asked(model: Config, options: Mapping[str, Any], *, unsaid: Mapping[str, Any] | None = None) -> Sampling:
    """Return how a finished model draws with some options of `Sampling` replaced, as `sampling_of` takes them.

    Args:
        model: its configuration.
        options: by name; None leaves one as it is.
        unsaid: what an option is when nobody asked for it, where all of them are given.

    Raises:
        ConfigError: an option is out of range, or this model never reads it; what it has already is no question.
    """
    asked, own = sampling_of(model, **options), sampling_of(model).record()
    found, faults = asked.record(), []
    useless = _without_effect(model, found)
    for name, value in options.items():
        paths = ("sample.coarse_steps", "sample.fine_steps") if name == "steps" else (f"sample.{name}",)
        if unsaid and found[name] == unsaid[name]:
            continue
        # One number of steps is cut to what a level takes, so that the result does not show it.
        is_new = found[name] != own[name] or (name == "steps" and as_integer(value) not in (None, 1))
        if value is not None and is_new and all(path in useless for path in paths):
            reasons = " and ".join(dict.fromkeys(useless[path] for path in paths))
            faults.append(f"{name}={value!r}: has no effect on this model: {reasons}. Leave it out.")
    if faults:
        raise ConfigError("\n  ".join(faults))
    return asked


def set_aside(paths: Iterable[str], config: Config, model: Config) -> str:
    """Return what a recipe says otherwise of the weights of a finished model, `paths` apart; empty for nothing."""
    wanted, own = flatten(config), flatten(model)
    belongs = {path: leaf for path, leaf in leaves().items() if path not in paths and path != "name"}
    differ = [
        f"{path}={wanted[path]!r} (the model: {own[path]!r})"
        for path, leaf in belongs.items()
        if leaf.metadata["affects_result"]
        and not (leaf.metadata["is_asked"] or leaf.metadata["read_by"])
        and wanted[path] != own[path]
    ]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return (
        f"of the weights the model's own keys count, not the recipe's: {', '.join(differ[:3])}{more}" if differ else ""
    )


def unmeasured(task: str, paths: Iterable[str], config: Config) -> Iterator[str]:
    """Yield why keys cannot be given to a task that measures images and no model."""
    wanted = flatten(config)
    for path in paths:
        if path.partition(".")[0] not in _MEASURING and config.once.get(path, wanted[path]) != wanted[path]:
            yield (
                f"config.{path}={wanted[path]!r}: --task={task} measures images that are there and does not read it. "
                "Leave it out."
            )


def _without_effect(model: Config, asked: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of drawing that this model never reads with the options of `config.sample`, and the reason."""
    name, kind, drawn = model.generator.backbone.name, kind_of(model), {level.kind for level in levels(model)}
    found = {
        path: f"only {' or '.join(other for other in KINDS if path in KINDS[other].options)} reads it, this is {name}"
        for path in {path for other in KINDS.values() for path in other.options}
        if path not in kind.options
    }
    if "sample.aggregate" in kind.options and model.generator.aggregate.streams == 1:
        found["sample.aggregate"] = "generator.aggregate.streams=1 is one copy"
    if asked["guidance_schedule"] != "interval":
        found["sample.guidance_interval"] = f"guidance_schedule={asked['guidance_schedule']} has no interval"
    if asked["guidance_scale"] == 1:
        found |= dict.fromkeys(
            ("sample.guidance_schedule", "sample.guidance_interval"), "guidance_scale=1 is no guidance"
        )
    if asked["density_draws"] == 1:
        found.setdefault("sample.density_keep", "density_draws=1 leaves no choice")
    if not (kind.has_streams and "continuous" in drawn and model.generator.continuous_head == "diffusion"):
        found["generator.diffusion.sample_steps"] = "only a diffusion head reads it"
    else:
        found |= dict.fromkeys(ENERGY_OPTIONS, "only an energy head reads it")
    if "continuous" not in drawn:
        found |= dict.fromkeys(set(ENERGY_OPTIONS) - found.keys(), "it draws no continuous level")
    of_ids = ("sample.coarse_temperature", "sample.top_k", "sample.top_p")
    for what, steps, options in (
        ("discrete", ("generator.coarse.steps", "sample.coarse_steps"), of_ids),
        ("continuous", ("generator.fine.steps", "sample.fine_steps"), ("sample.temperature",)),
    ):
        if what not in drawn:
            found = dict.fromkeys((*steps, *options), f"it draws no {what} level") | found
        elif max(kind.most_steps(model, level) for level in levels(model) if level.kind == what) == 1:
            found |= dict.fromkeys(steps, "each of its levels takes one pass")
    return found
