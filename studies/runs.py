"""Running the arms of a study: ordinary run folders driven by the ordinary stages, so that resuming comes for free."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ear_jax.bench.timing import time_stages
from ear_jax.config.schema import Config
from ear_jax.config.suggest import did_you_mean
from ear_jax.config.values import flatten
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of, read_json, write_json
from ear_jax.inference import pipeline
from ear_jax.stages.generator import train_generator
from ear_jax.stages.latents import cache_latents
from ear_jax.stages.session import open_session
from ear_jax.stages.tokenizer import train_tokenizer

from .arms import Arm, with_changes


def tokenizer_run(config: Config, folder: Path) -> pipeline.Pipeline:
    """Train the tokenizer of a configuration in a folder, unless it is there, and load it."""
    with open_session(config, str(folder)) as session:
        train_tokenizer(session)
    return pipeline.load(folder / "tokenizer" / "model")


def latents_run(config: Config, folder: Path) -> None:
    """Make the cache of tokens of a tokenizer run, unless it is there."""
    with open_session(config, str(folder)) as session:
        train_tokenizer(session)
        cache_latents(session)


def generator_run(config: Config, folder: Path, tokenizer: Path) -> pipeline.Pipeline:
    """Train a generator on the tokens of the tokenizer run in `tokenizer`, unless it is there, and load it."""
    changes = {
        "tokenizer.source": str(tokenizer / "tokenizer" / "model"),
        "latents.source": f"latents:{tokenizer / 'latents'}",
    }
    with open_session(with_changes(config, changes), str(folder)) as session:
        train_tokenizer(session)
        train_generator(session)
    return pipeline.load(folder / "generator" / "model")


def chosen_arms(config: Config, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Return the arms that `config.study.arms` names, or all.

    Raises:
        ConfigError: an arm is chosen that the study does not have.
    """
    known = [arm.name for arm in arms]
    unknown = [name for name in config.study.arms if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(
            f"config.study.arms={config.study.arms!r}: {unknown[0]!r} is none of {', '.join(known)}.{hint}"
        )
    return tuple(arm for arm in arms if arm.name in (config.study.arms or known))


def each_seed(
    config: Config, root: Path, arms: tuple[Arm, ...], seeds: tuple[int, ...]
) -> Iterator[tuple[Arm, int, Config, Path]]:
    """Yield every chosen arm with every seed, its configuration and its run folder; says where the study is.

    Raises:
        ConfigError: an arm is chosen that the study does not have.
    """
    arms = chosen_arms(config, arms)
    done, began = 0, time.monotonic()
    # The first two arms carry the verdict, so they get all their seeds first.
    order = [(arm, seed) for group in (arms[:2], arms[2:]) for seed in seeds for arm in group]
    for arm, seed in order:
        done += 1
        minutes = (time.monotonic() - began) / 60
        print(f"study       {arm.name}, seed {seed} ({done} of {len(order)}, {minutes:.0f} min)", flush=True)
        # A run does not depend on which others are done beside it.
        own = {**arm.changes, "seed": seed, "study.arms": (arm.name,), "study.seeds": (seed,)}
        yield arm, seed, with_changes(config, own), root / arm.name / f"seed{seed}"
        jax.clear_caches()


def kept(folder: Path, config: Config, measure: Callable[[], Any], *conditions: str, name: str = "result") -> Any:
    """Return the result kept in a run folder if it was measured under this configuration, else measure and keep it.

    `conditions` are what it depends on beside the configuration: the digest of the data, the device.
    """
    path = folder / f"{name}.json"
    made_from = digest_of(json.dumps(flatten(config), sort_keys=True, default=str), *conditions)
    found = read_json(path)
    if found is not None and found.get("made_from") == made_from:
        return found["value"]
    value = measure()
    write_json(path, {"made_from": made_from, "value": value})
    return value


WARMUP_REPEATS = 2
REPEATS = 10


def image_ms(
    root: Path, config: Config, images: int, calls: Callable[[], Mapping[str, Callable[[], Any]]]
) -> dict[str, dict[str, float]]:
    """Return the median time of each call in ms an image, and its 10th and 90th percentile.

    The calls take turns, so that what else the machine does falls on all of them alike. The result is kept in
    `times.json`; delete it to measure again.

    Args:
        root: Folder of the study.
        config: Its configuration.
        images: How many images a call makes.
        calls: Makes the calls by name; asked only when they have to be timed.
    """

    def measure() -> dict[str, dict[str, float]]:
        timings = time_stages(calls(), warmup_repeats=WARMUP_REPEATS, repeats=REPEATS)
        return {
            timing.name: {
                "median": timing.median_ms / images,
                "p10": timing.p10_ms / images,
                "p90": timing.p90_ms / images,
            }
            for timing in timings
        }

    return kept(root, config, measure, jax.local_devices()[0].device_kind, name="times")
