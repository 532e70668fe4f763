"""The smallest recipe that has every part: shapes of 16 px, a 4 x 4 latent, two levels, a transformer of two blocks.

Compiling is nearly all that a run of it costs, so runs of one recipe share their programs, compiled in haste.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from quick import QUICK
from random_weights import random_weights

from ear_jax import build
from ear_jax.config import read
from ear_jax.config.derive import stage_lengths, tokenizer_levels
from ear_jax.config.schema import (
    BackboneConfig,
    CoarseConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EnergyHeadConfig,
    EvaluateConfig,
    FineConfig,
    GeneratorConfig,
    KLVAEConfig,
    LatentsConfig,
    LevelConfig,
    LiteVAEConfig,
    SampleConfig,
    ShapesConfig,
    TokenizerConfig,
    TrainingConfig,
    VQVAEConfig,
)
from ear_jax.data.latents import CacheDescription, LatentsSource, LatentsWriter
from ear_jax.data.loader import Loader
from ear_jax.data.open import open_split
from ear_jax.distributed.mesh import make_mesh
from ear_jax.folders import model_folder
from ear_jax.levels import TokenizerSpec
from ear_jax.training import ledger, loop
from ear_jax.training.optim import resolve
from ear_jax.training.step import TrainState
from ear_jax.types import usual_group

TRAINING = TrainingConfig(
    batch_size=8,
    steps=6,
    learning_rate=1e-3,
    warmup_steps=2,
    final_phase_steps=2,
    ema_decay=0.9,
    compute_dtype="float32",
    log_every_steps=2,
    checkpoint_every_steps=100,
)

CONFIG = Config(
    name="tiny",
    data=DataConfig(image_px=16, eval_images=16, shapes=ShapesConfig(images=64, classes=4), decode_threads=1),
    tokenizer=TokenizerConfig(
        vae=LiteVAEConfig(
            encoder="custom",
            wavelet_levels=2,
            latent_channels=4,
            encoder_channels=8,
            encoder_multipliers=(1,),
            decoder_channels=8,
            decoder_multipliers=(1, 1),
            decoder_blocks=1,
            decoder_attention=False,
            decoder_norm="group",
            decoder_output="wavelet",
        ),
        coarse=CoarseConfig(grids=(2,), codes=8, code_channels=4),
        kl_vae=KLVAEConfig(channels=8, multipliers=(1, 1, 1), blocks=1, latent_channels=4),
        vqvae=VQVAEConfig(channels=8, multipliers=(1, 1, 1), blocks=1, latent_channels=4, codes=8, scales=(1, 2, 4)),
        fine=FineConfig(channels=8, multipliers=(1, 1)),
        hybrid_start_steps=2,
    ),
    tokenizer_training=TRAINING,
    latents=LatentsConfig(batch_size=32),
    generator=GeneratorConfig(
        backbone=BackboneConfig(width=16, depth=2, encoder_depth=1, heads=2, class_tokens=2),
        energy=EnergyHeadConfig(width=16, depth=1, noise_channels=4),
        diffusion=DiffusionConfig(width=16, depth=1, train_steps=50, sample_steps=4, repeats=1),
        coarse=LevelConfig(steps=2, mask_ratio="cosine", mask_ratio_low=0.0),
        fine=LevelConfig(steps=1),
    ),
    generator_training=TRAINING,
    sample=SampleConfig(count=4, batch_size=4),
    evaluate=EvaluateConfig(
        samples=8, reconstructions=8, classifier_steps=2, classifier_batch_size=8, classifier_channels=4
    ),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the recipe as a config file does; this file can be given to `--config`."""
    return ml_collections.ConfigDict(read.to_dict(CONFIG))


def tiny_config(**overrides: Any) -> Config:
    """Return the tiny recipe with keys replaced; paths are written with two underscores: `mesh__data=1`."""
    config: Any = CONFIG
    for path, value in overrides.items():
        config = _replaced(config, path.split("__"), value)
    return config


def _replaced(group: Any, names: list[str], value: Any) -> Any:
    head, *rest = names
    return dataclasses.replace(group, **{head: _replaced(getattr(group, head), rest, value) if rest else value})


# Overrides of `tiny_config` for images of 8 px and a transformer of one block.
SMALLEST: dict[str, Any] = dict(
    data__image_px=8,
    tokenizer__vae__wavelet_levels=1,
    tokenizer__vae__decoder_multipliers=(1,),
    tokenizer__fine__multipliers=(1,),
    generator__backbone__depth=1,
)


# The same as arguments of a command line.
SMALLEST_ARGUMENTS = tuple(
    f"--config.{path.replace('__', '.')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for path, value in SMALLEST.items()
)


def one_device_mesh(**_: int) -> Mesh:
    """Return a mesh of the first device alone, whatever is asked for."""
    return make_mesh(devices=jax.devices()[:1])


def write_latents(config: Config, folder: Path) -> None:
    """Write a cache of random tokens of the recipe's levels, one row an image."""
    specs = tokenizer_levels(config)
    names = tuple(f"class {number}" for number in range(config.data.shapes.classes))
    description = CacheDescription(config.data.shapes.images, specs, names, "random", "float32")
    random = np.random.default_rng(0)

    def posterior() -> dict[str, np.ndarray]:
        rows = {}
        for name, (shape, _) in description.arrays().items():
            if name.startswith("level_"):
                rows[name] = random.integers(0, specs[int(name[6:])].size, (description.images, *shape))
            else:
                rows[name] = np.abs(random.normal(size=(description.images, *shape)))
        return rows

    writer = LatentsWriter(folder, description)
    writer.write(posterior(), posterior(), np.arange(description.images) % len(names))
    writer.finish_shard()
    writer.finish()


def stage_run(stage: str, config: Config, folder: Path, mesh: Mesh) -> loop.StageRun:
    """Return a run of a stage in a folder; the generator's tokens are random. The caller closes ledger and loader."""
    if stage == "tokenizer":
        source, settings = open_split(config.data, "train", seed=config.seed), config.tokenizer_training
        group = usual_group

        def create(rngs: nnx.Rngs) -> nnx.Module:
            return build.build_tokenizer_objective(config, rngs=rngs)
    else:
        latents = folder.parent / f"latents_{folder.name}"
        if not latents.exists():
            write_latents(config, latents)
        source, settings = LatentsSource(latents), config.generator_training
        spec = TokenizerSpec(config.data.image_px, source.levels)
        group = build.abstract_generator(config, spec, len(source.class_names)).group

        def create(rngs: nnx.Rngs) -> nnx.Module:
            return build.build_generator(config, spec, len(source.class_names), rngs=rngs)

    return loop.StageRun(
        stage=stage,
        config_name=config.name,
        config_dict=read.to_dict(config),
        settings=settings,
        recipe=resolve(settings, stage_lengths(settings, len(source))),
        group=group,
        create=create,
        loader=Loader(source, batch_size=settings.batch_size, seed=config.seed, use_flip=True, prefetch_batches=2),
        mesh=mesh,
        seed=config.seed,
        folder=folder,
        ledger=ledger.Ledger(folder, "test"),
        tensorboard_folder=folder / "tensorboard",
    )


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Make `lower(...).compile()` leave out XLA's optimisations: half the time to compile; nothing here runs long."""
    original = jax.stages.Lowered.compile
    with mock.patch.object(jax.stages.Lowered, "compile", lambda lowered: original(lowered, QUICK)):
        yield


class Programs:
    """Keeps what `train` compiles, so that the runs of one recipe on one mesh compile once."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    @contextlib.contextmanager
    def shared(self, *key: Any) -> Iterator[None]:
        """Let every `train` within use the programs kept under `key`."""
        plan_state, compile_step = loop.plan_state, loop._compile

        def kept(name: str, make: Any) -> Any:
            if (name, key) not in self._kept:
                self._kept[name, key] = make()
            return self._kept[name, key]

        with (
            quick_compilation(),
            mock.patch.object(loop, "plan_state", lambda *a, **k: kept("plan", lambda: plan_state(*a, **k))),
            mock.patch.object(loop, "_compile", lambda *a: kept("step", lambda: compile_step(*a))),
            mock.patch.object(loop, "loader_images_per_s", lambda loader: 0.0),
        ):
            yield

    def train(self, stage: str, config: Config, folder: Path, mesh: Mesh) -> TrainState:
        """Train a stage in a folder, from its checkpoint where there is one, and return the final state."""
        folder.mkdir(parents=True, exist_ok=True)
        run = stage_run(stage, config, folder, mesh)
        with contextlib.closing(run.ledger), contextlib.closing(run.loader):
            # Whatever changes the program is in the recipe, the accumulation or the mesh.
            with self.shared(stage, run.recipe, run.settings.accumulation_steps, tuple(mesh.shape.items())):
                return loop.train(run)[1]


def random_model(folder: Path, config: Config, names: Sequence[str]) -> Path:
    """Write a model folder with random weights and return where it is."""
    static, *arrays = random_weights(lambda keys: build.build_tokenizer(config, rngs=keys))
    spec = static.merge(*arrays).spec
    _, *own = random_weights(lambda keys: build.build_generator(config, spec, len(names), rngs=keys))
    parts = {"tokenizer": arrays[0] | arrays[1], "generator": own[0] | own[1]}
    tensors = {part: {name: np.asarray(leaf) for name, leaf in named.items()} for part, named in parts.items()}
    return model_folder.write(folder, read.to_dict(config), tensors, tuple(names), {})


def to_numpy(state: Any) -> dict[str, np.ndarray]:
    """Return all arrays of a state by path, on the host."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Return the names of arrays that are not equal bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if found[name].tobytes() != expected[name].tobytes()]


def updates(folder: Path) -> list[tuple[int, str, str, str]]:
    """Return step, loss, gradient norm and digest of the batch of every update that counts, in order."""
    records = ledger.read(folder / ledger.FILE_NAME)
    return [
        (record["step"], record["loss_hex"], record["grad_norm_hex"], record["batch"])
        for record in records
        if record["event"] == "step"
    ]
