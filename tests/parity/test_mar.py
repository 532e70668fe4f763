"""MAR's encoder and decoder with its diffusion head against the published implementation: loss, gradients, sampling."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity.apply_entries import to_ours, to_theirs
from parity.ear_case import images, ranks_of, rows
from parity.golden import Golden

from ear_jax.backbones.mar import MarBackbone
from ear_jax.generators import guidance
from ear_jax.generators.masked import LevelPlan, MaskedGenerator
from ear_jax.generators.masked_sampler import fill_level
from ear_jax.generators.masking import mask_first, masked_after_steps
from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.patches import patchify
from ear_jax.nn.transformer import Trunk
from ear_jax.types import Tokens
from ear_jax.weights.families.masked import mar_entries

NUMBER = r"([\d.]+)"
TRAINING = rf"(loss|z|gradnorm|grad_.+|mask)_masked(\d+)_drop{NUMBER}"
SAMPLES = rf"tokens_iter(\d+)_cfg{NUMBER}_(\w+)"
STEPS = r"masklen_iter(\d+)"
ENCODER = rf"encoder_masked(\d+)_drop{NUMBER}"


class PositionedHead(DiffusionHead):
    """A diffusion head that draws each position with the noise written down for it."""

    def __init__(self, *, batch: int, tokens: int, **options: Any):
        super().__init__(**options)
        self.start_BND = nnx.Variable(jnp.zeros((batch, tokens, self.channels)))
        self.noise_SBND = nnx.Variable(jnp.zeros((self.sample_steps, batch, tokens, self.channels)))

    def noise_at(self, step: jax.Array) -> jax.Array:
        """The reference counts denoising steps from the noisiest one, we from the last."""
        return self.noise_SBND[...][self.sample_steps - 1 - step]

    def sample(self, prediction: jax.Array, keys_B: jax.Array, temperature: Any) -> jax.Array:
        return self.draw(prediction, self.start_BND[...], self.noise_at, temperature)

    def sample_guided(
        self, conditional: jax.Array, unconditional: jax.Array, guidance_scale: Any, keys_B: jax.Array, temperature: Any
    ) -> jax.Array:
        start = self.start_BND[...]
        return self.draw_guided(conditional, unconditional, guidance_scale, start, self.noise_at, temperature)


class MarCase:
    """The fixture's model, and its generator for a given number of repeats."""

    def __init__(self, golden: Golden):
        self.golden, config = golden, golden.config
        self.config = config
        self.inputs = {name: jnp.asarray(array) for name, array in golden.inputs.items()}
        grid = config["img_size"] // config["vae_stride"] // config["patch_size"]
        self.level = LevelSpec("fine", grid, "continuous", config["vae_embed_dim"] * config["patch_size"] ** 2)
        self.entries = mar_entries(
            encoder_depth=config["encoder_depth"],
            depth=config["decoder_depth"],
            head_depth=config["diffloss_d"],
            class_tokens=config["buffer_size"],
        )
        self.static, shapes, _ = functional(nnx.eval_shape(self._create))
        converted = to_ours(self.entries, golden.params, shapes)
        self.arrays = {name: jnp.asarray(array) for name, array in converted.items()}

    def _create(self) -> MaskedGenerator:
        config, rngs = self.config, Keys(0)
        backbone = MarBackbone(
            Trunk(
                width=config["encoder_embed_dim"],
                depth=config["decoder_depth"],
                heads=config["encoder_num_heads"],
                mlp_ratio=config["mlp_ratio"],
            ),
            levels=(self.level,),
            classes=config["class_num"],
            encoder_depth=config["encoder_depth"],
            class_tokens=config["buffer_size"],
            rngs=rngs,
        )
        head = PositionedHead(
            batch=config["batch"],
            tokens=self.level.tokens,
            hidden_width=config["decoder_embed_dim"],
            channels=self.level.size,
            width=config["diffloss_w"],
            depth=config["diffloss_d"],
            sample_steps=int(config["num_sampling_steps"]),
            repeats=config["diffusion_batch_mul"],
            rngs=rngs,
        )
        plan = LevelPlan(self.level, "truncated_normal", config["mask_ratio_min"], 0.25, 0.0, 1.0)
        return MaskedGenerator(
            backbone=backbone, heads=[head], plans=(plan,), patch_size=config["patch_size"], label_drop=0.1
        )

    def generator(self, arrays: Any) -> MaskedGenerator:
        noise = {"heads/0/start_BND": self.inputs["init_noise"], "heads/0/noise_SBND": self.inputs["step_noise"]}
        return self.static.merge(arrays, noise)


@pytest.fixture(scope="module")
def case(goldens) -> MarCase:
    return MarCase(Golden(goldens, "mar"))


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def outputs(case: MarCase, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
    found = [(name, re.fullmatch(pattern, name)) for name in case.golden.outputs]
    named = [(name, match.groups()) for name, match in found if match]
    assert named, f"no output is named {pattern}"
    return named


def test_weights_survive_the_round_trip_bit_by_bit(case):
    written = to_theirs(case.entries, {name: np.asarray(array) for name, array in case.arrays.items()})
    assert set(written) == set(case.golden.params)
    for name, array in case.golden.params.items():
        np.testing.assert_array_equal(written[name], array)


def test_weight_decay_leaves_out_vectors_biases_and_the_head(case):
    generator = case.generator(case.arrays)
    for entry in case.entries:
        for theirs in entry.theirs:
            array = case.golden.params[theirs]
            excluded = array.ndim == 1 or theirs.endswith(".bias") or "diffloss" in theirs
            for ours in entry.ours:
                assert generator.group(ours).decays != excluded, (theirs, ours)


def training_loss(case: MarCase, most_visible: int | None, arrays: Any, count: Any, drop: Any) -> tuple[jax.Array, Any]:
    """The loss with the recorded order, steps and noise; hidden states and mask besides."""
    inputs, generator = case.inputs, case.generator(arrays)
    (level,) = generator.to_levels(Tokens((rows(inputs["img"]),)))
    mask = mask_first(ranks_of(inputs["orders"]), count)
    drop_B = inputs["u_label"] < drop
    hidden = generator.backbone((level,), mask, inputs["labels"], drop_B, most_visible=most_visible)
    head: Any = generator.heads[0]
    steps, noise = inputs["t"].reshape(head.repeats, *mask.shape), inputs["noise"].reshape(head.repeats, *level.shape)
    return head.loss_at(hidden, level, mask, steps, noise)[0], (hidden, mask)


def test_training_loss_and_gradients(case):
    """As in training, the encoder is as long as the most visible tokens of any image."""
    wanted = outputs(case, TRAINING)
    most_visible = case.level.tokens - min(int(count) for _, (_, count, _) in wanted)
    run = jax.jit(jax.value_and_grad(lambda *args: training_loss(case, most_visible, *args), has_aux=True))
    for count, drop in sorted({(c, d) for _, (_, c, d) in wanted}):
        (loss, (hidden, mask)), gradients = run(case.arrays, jnp.asarray(int(count)), float(drop))
        theirs = to_theirs(case.entries, {name: np.asarray(array) for name, array in gradients.items()})
        norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in theirs.values()))
        named = {"loss": loss[None], "z": hidden, "gradnorm": norm[None], "mask": mask.astype(jnp.int32)}
        named |= {f"grad_{name}": array for name, array in theirs.items()}
        for name, (kind, c, d) in wanted:
            if (c, d) == (count, drop):
                case.golden.check(name, named[kind])


def test_an_encoder_over_the_whole_sequence_gives_the_same(case):
    wanted = [(name, groups) for name, groups in outputs(case, TRAINING) if groups[0] in ("loss", "z")]
    run = jax.jit(lambda *args: training_loss(case, None, *args))
    for name, (kind, count, drop) in wanted:
        loss, (hidden, _) = run(case.arrays, jnp.asarray(int(count)), float(drop))
        case.golden.check(name, loss[None] if kind == "loss" else hidden)


def test_encoder_of_visible_tokens(case):
    """The reference keeps class tokens and visible tokens in their order; ours come first, in the same order."""
    wanted, inputs = outputs(case, ENCODER), case.inputs

    @jax.jit
    def encode(arrays, count, drop):
        backbone = case.generator(arrays).backbone
        mask = mask_first(ranks_of(inputs["orders"]), count)
        classes = backbone.class_embedding[...][inputs["labels"]]
        condition = jnp.where(inputs["u_label"][:, None] < drop, backbone.null_embedding[...], classes)
        return backbone.encode((patchify(rows(inputs["img"]), case.config["patch_size"]),), mask, condition)[0]

    for name, (count, drop) in wanted:
        encoded = encode(case.arrays, jnp.asarray(int(count)), float(drop))
        case.golden.check(name, encoded[:, : encoded.shape[1] - int(count)])


def test_sampling_for_every_number_of_steps_scale_and_schedule(case):
    inputs, tokens = case.inputs, case.level.tokens
    ranks = ranks_of(inputs["orders"])
    keys = jax.random.split(jax.random.key(0), len(ranks))
    wanted = outputs(case, SAMPLES)
    longest = max(int(steps) for _, (steps, _, _) in wanted)

    @jax.jit
    def draw(arrays, masked_after, shares, scale):
        generator = case.generator(arrays)
        level = fill_level(
            generator.backbone,
            generator.heads[0],
            case.level,
            (),
            inputs["labels"],
            keys,
            ranks,
            masked_after,
            shares,
            guidance_scale=scale,
            temperature=case.config["temperature"],
        )
        return images(generator.to_tokens((level,)).levels[0])

    for name, (steps, scale, schedule) in wanted:
        table = masked_after_steps(tokens, int(steps))
        shares = guidance.growth(table, tokens, schedule)
        # Steps that draw nothing fill up the program's length, so that one is compiled for all.
        inputs_T = [jnp.asarray(np.pad(values, (0, longest - int(steps)), mode="edge")) for values in (table, shares)]
        guided = None if float(scale) == 1.0 else float(scale)
        case.golden.check(name, draw(case.arrays, *inputs_T, guided))
    for name, (steps,) in outputs(case, STEPS):
        case.golden.check(name, np.maximum(masked_after_steps(tokens, int(steps)), 1))


def test_every_output_has_its_test(case):
    named = [name for pattern in (TRAINING, ENCODER, SAMPLES, STEPS) for name, _ in outputs(case, pattern)]
    assert sorted(named) == sorted(case.golden.outputs)
