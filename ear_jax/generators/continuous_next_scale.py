"""ParScale-EAR's kind: next-scale prediction over continuous latents, an energy head draws a scale in one step."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.backbones.next_scale import NextScaleBackbone
from ear_jax.backbones.parallel import PREFIXES, ParallelBackbone
from ear_jax.config import kinds
from ear_jax.config.schema import Config
from ear_jax.generators import guidance
from ear_jax.generators.coarse_scales import CoarseScales, coarse_heads
from ear_jax.generators.kind import level_keys, trunk_of
from ear_jax.generators.next_scale import UNDECAYED, FrozenVariable, growth
from ear_jax.heads.density import by_density
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.joint import JointEnergyHead
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.nn.resize import apply_to_axes, area_matrix, bicubic_matrix
from ear_jax.sampling import Sampling
from ear_jax.types import Batch, Group, LevelSpec, Metrics, Posterior, TokenizerSpec, Tokens, usual_group

Seen = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
"""What the model sees of the tokens of scale k: the tokens themselves, changed or not, and how much of them is left."""


class ContinuousNextScaleGenerator(nnx.Module):
    """Models a latent map as a pyramid of continuous scales given a class; each scale is drawn in one pass.

    A scale is the map reduced by areas (`absolute` targets), or what the scales before it left over (`residual`: the
    remainder of what was *seen*, so that later scales correct what was wrong with earlier ones), at unit scale by
    measured statistics. Its input is the coarser one enlarged (`absolute`), or the sum so far reduced (`residual`),
    with one more channel: how much of it is left, w. While training each scale in view becomes w x + (1 - w) noise, w
    uniform from 1 - `context_noise` to 1, one an image and scale; in sampling w is 1.

    `scales` are sides in latent pixels, the last that of the map, whose tokens are squares of `patch_size`. `heads` are
    one for all scales, and one of its own for the last where squares make its tokens larger.

    With `coarse`, levels of ids come first, each drawn in one pass by its own of `coarse_heads`; what later scales see
    of them are their codes, with noise as on others, in channels of their own between those of the latent and w.
    """

    def __init__(
        self,
        *,
        backbone: NextScaleBackbone,
        heads: Sequence[EnergyHead],
        scales: tuple[int, ...],
        levels: tuple[LevelSpec, ...],
        patch_size: int,
        targets: str,
        context_noise: float,
        own_context_probability: float,
        scale_weight_power: float,
        least_draws: int,
        label_drop: float,
        coarse: CoarseScales | None = None,
        coarse_heads: Sequence[Any] = (),
    ):
        self.backbone = backbone
        self.coarse = coarse
        self.coarse_heads: Sequence[Any] = nnx.List(coarse_heads)
        self.first = len(coarse_heads)
        self.frozen: tuple[str, ...] = coarse.frozen if coarse is not None else ()
        self.heads: Sequence[EnergyHead] = nnx.List(heads)
        self.scales, self.levels, self.patch_size = scales, levels, patch_size
        self.is_residual = targets == "residual"
        self.context_noise = context_noise
        self.own_context_probability = own_context_probability
        self.scale_weight_power = scale_weight_power
        self.least_draws = least_draws
        self.label_drop = label_drop
        shape = (len(scales), levels[-1].size // patch_size**2)
        self.scale_mean = FrozenVariable(jnp.zeros(shape, jnp.float32))
        self.scale_std = FrozenVariable(jnp.ones(shape, jnp.float32))

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each scale: tokens^(1 - a), together 1."""
        raw = {level.name: level.tokens ** (1 - self.scale_weight_power) for level in self.levels}
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def group(self, name: str) -> Group:
        """Return VAR's group in the backbone and EAR's in the heads, whose matrices have a rate of their own."""
        if name.startswith("heads/") and name.endswith("/kernel"):
            return Group(decays=False, is_head=True)
        return usual_group(name, *UNDECAYED, *PREFIXES)

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        """Turn the tokenizer's map into the scales, as they are without noise."""
        return self._pyramid(self._map(tokens), _clean, tokens.levels[:-1])[0]

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        """Undo `to_levels`: the last scale, or the sum of all where they are residual."""
        running = None
        for k, level in enumerate(levels):
            if self.is_residual or k == len(levels) - 1:
                running = self._added(running, level, k)
        assert running is not None
        return Tokens((*levels[: self.first], running.reshape(running.shape[0], -1, running.shape[-1])))

    def measure(self, batches: Iterable[Batch]) -> dict[str, jax.Array]:
        """Return mean and deviation of each scale and channel over cached batches, by the names of their arrays."""
        total: Any = None
        for number, batch in enumerate(batches):
            values = self._map(Posterior.from_batch(batch).sample(jax.random.key(number)))
            maps = self._raw_scales(values)
            counts = [jnp.full(x.shape[-1], x[..., 0].size, jnp.float32) for x in maps]
            powers = [(n, x.sum((0, 1, 2)), jnp.square(x).sum((0, 1, 2))) for n, x in zip(counts, maps, strict=True)]
            sums = [jnp.stack(own) for own in powers]
            total = jnp.stack(sums) if total is None else total + jnp.stack(sums)
        count, first, second = jnp.moveaxis(total, 1, 0)
        mean = first / count
        return {"scale_mean": mean, "scale_std": jnp.sqrt(jnp.maximum(second / count - mean**2, 1e-8))}

    def loss(
        self, batch: Batch, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the weighted sum of the energy scores of all scales, each with the coarser ones in view.

        Labels are dropped with probability `label_drop`.
        """
        token_rng, drop_rng, noise_rng, backbone_rng, head_rng, own_rng = jax.random.split(rng, 6)
        drawn = Posterior.from_batch(batch).sample(token_rng)
        values, ids = self._map(drawn), drawn.levels[:-1]
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        drop_B = jax.random.uniform(drop_rng, labels_B.shape, jnp.float32) < self.label_drop
        own = self._own_draws(values, ids, labels_B, drop_B, own_rng) if self.own_context_probability else None

        def seen(tokens: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
            w_rng, n_rng, o_rng = jax.random.split(jax.random.fold_in(noise_rng, k), 3)
            kept_B = 1 - self.context_noise * jax.random.uniform(w_rng, labels_B.shape, jnp.float32)
            w_B11 = kept_B[:, None, None]
            noisy = w_B11 * tokens + (1 - w_B11) * jax.random.normal(n_rng, tokens.shape, jnp.float32)
            if own is None:
                return noisy, kept_B
            is_own = jax.random.uniform(o_rng, labels_B.shape, jnp.float32) < self.own_context_probability
            return jnp.where(is_own[:, None, None], own[k], noisy), jnp.where(is_own, 1.0, kept_B)

        targets, inputs_BMD = self._pyramid(values, seen if self.context_noise or own is not None else _clean, ids)
        hidden_BLE = self.backbone(inputs_BMD, labels_B, drop_B, backbone_rng)
        total, metrics = jnp.float32(0.0), {}
        for k, (level, target_BND) in enumerate(zip(self.levels, targets, strict=True)):
            everywhere_BN = jnp.ones(target_BND.shape[:2], bool)
            own_head_rng = jax.random.fold_in(head_rng, k)
            draws = {"least_draws": self.least_draws} if k >= self.first else {}
            loss, more = self._head(k).loss(
                self._of_scale(hidden_BLE, k), target_BND, everywhere_BN, own_head_rng, dict(controls), **draws
            )
            total = total + self.loss_weights[level.name] * loss
            metrics[f"loss/{level.name}"] = loss
            metrics |= {f"{name}/{level.name}": value for name, value in more.items()}
        return total, metrics

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Draw all scales in one piece; raises ValueError for a context, whose keys and values are not here.

        Keys and values are cached: one pass a scale. Guidance acts on hidden states and grows with the scale as
        `guidance_schedule` says.
        """
        if context:
            raise ValueError("scales are drawn from the first on, in one piece; give no context")
        B, branches = labels_B.shape[0], 2 if sampling.is_guided else 1
        backbone = self.backbone
        if isinstance(backbone, ParallelBackbone) and sampling.aggregate:
            backbone = backbone.first(sampling.aggregate)
        condition = backbone.condition(jnp.concatenate([labels_B] * branches), jnp.arange(branches * B) >= B)
        cache = backbone.empty_cache(branches * B)
        shares = growth(len(self.levels), *sampling.guidance_growth).tolist()
        inputs, running, drawn = None, None, []
        for k in range(len(self.levels)):
            hidden, cache = backbone.extend(condition, inputs, k, cache)
            scale = guidance.at_step(sampling.guidance_scale, shares[k]) if sampling.is_guided else None
            drawn.append(self._draw_level(hidden, scale, k, level_keys(keys_B, k), sampling))
            if k < len(self.levels) - 1:
                seen = self._in_view(drawn[-1], k)
                running = self._added(running, seen, k)
                own = self._input(running, seen, jnp.ones((B,), jnp.float32), k + 1)
                inputs = jnp.concatenate([own] * branches)
        return tuple(drawn)

    def _draw_level(self, hidden: jax.Array, scale: Any, k: int, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
        """Draw level k: guidance mixes hidden states before an energy head, and logits, then filtered, of a softmax."""
        head, B = self._head(k), len(keys_B)

        def mixed(branches: jax.Array) -> jax.Array:
            return branches if scale is None else guidance.mix(branches[:B], branches[B:], scale)

        if k >= self.first:
            head = by_density(head, sampling.density_draws, sampling.density_keep)
            return head.sample(head.predict(mixed(hidden)), keys_B, sampling.temperature)
        allowed = guidance.filter_logits(mixed(head.predict(hidden)), top_k=sampling.top_k, top_p=sampling.top_p)
        return head.sample(allowed, keys_B, sampling.coarse_temperature)

    def _own_draws(
        self, values: jax.Array, ids: Sequence[jax.Array], labels_B: jax.Array, drop_B: jax.Array, rng: jax.Array
    ) -> list[jax.Array]:
        hidden_BLE = self.backbone(self._pyramid(values, _clean, ids)[1], labels_B, drop_B, None)
        keys_B = jax.random.split(rng, labels_B.shape[0])
        draws = []
        for k in range(len(self.levels) - 1):
            head = self._head(k)
            drawn = head.sample(head.predict(self._of_scale(hidden_BLE, k)), level_keys(keys_B, k), 1.0)
            draws.append(self._in_view(drawn, k))
        return jax.lax.stop_gradient(draws)

    def _head(self, k: int) -> Any:
        if k < self.first:
            return self.coarse_heads[k]
        return self.heads[-1 if k == len(self.levels) - 1 else 0]

    def _of_scale(self, hidden_BLE: jax.Array, k: int) -> jax.Array:
        start = sum(level.tokens for level in self.levels[:k])
        return hidden_BLE[:, start : start + self.levels[k].tokens]

    def _map(self, tokens: Tokens) -> jax.Array:
        fine_BND = tokens.levels[-1]
        side = self.scales[-1]
        return fine_BND.reshape(fine_BND.shape[0], side, side, -1)

    def _in_view(self, level: jax.Array, k: int) -> jax.Array:
        """Return the tokens of level k as later ones see them: ids as their codes."""
        return self.coarse.vectors(level, k) if self.coarse is not None and k < self.first else level

    def _pyramid(
        self, values: jax.Array, seen: Seen, ids: Sequence[jax.Array] = ()
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return the target of each level, and the inputs of all levels but the first, joined."""
        targets, inputs, running = [*ids], [], None
        for k in range(len(self.levels)):
            if k >= self.first:
                rest = values - running if self.is_residual and running is not None else values
                side = self.scales[k - self.first]
                targets.append(self._tokens(apply_to_axes(rest, area_matrix(self.scales[-1], side)), k))
            if k < len(self.levels) - 1:
                tokens, kept_B = seen(self._in_view(targets[k], k), k)
                running = self._added(running, tokens, k)
                inputs.append(self._input(running, tokens, kept_B, k + 1))
        B, D = values.shape[0], values.shape[-1]
        more = self.coarse.channels if self.coarse is not None else 0
        joined = jnp.concatenate(inputs, axis=1) if inputs else jnp.zeros((B, 0, D + more + 1), jnp.float32)
        return tuple(targets), joined

    def _raw_scales(self, values: jax.Array) -> list[jax.Array]:
        """Return the maps of all scales before they are brought to unit scale."""
        maps, rest = [], values
        for side in self.scales:
            maps.append(apply_to_axes(rest, area_matrix(self.scales[-1], side)))
            if self.is_residual:
                rest = rest - apply_to_axes(maps[-1], bicubic_matrix(side, self.scales[-1]))
        return maps

    def _tokens(self, maps: jax.Array, k: int) -> jax.Array:
        number = k - self.first
        unit = (maps - self.scale_mean[...][number]) / self.scale_std[...][number]
        tokens = unit.reshape(unit.shape[0], -1, unit.shape[-1])
        return patchify(tokens, self.patch_size) if k == len(self.levels) - 1 else tokens

    def _added(self, running: Any, tokens: jax.Array, k: int) -> Any:
        """Return the map of the scales so far: the sum where they are residual, else the last one."""
        number = k - self.first
        if number < 0:  # codes are no part of the latent
            return running
        unit = unpatchify(tokens, self.patch_size) if k == len(self.levels) - 1 else tokens
        side, last = self.scales[number], self.scales[-1]
        maps = unit.reshape(unit.shape[0], side, side, -1) * self.scale_std[...][number] + self.scale_mean[...][number]
        if not self.is_residual:
            return maps
        maps = maps if side == last else apply_to_axes(maps, bicubic_matrix(side, last))
        return maps if running is None else running + maps

    def _input(self, running: Any, tokens: jax.Array, kept_B: jax.Array, k: int) -> jax.Array:
        """Return the inputs of scale k: what is seen of the coarser ones on its grid, and how much of it is left."""
        side, is_code = self.levels[k].grid, k - 1 < self.first
        below = self.levels[k - 1].grid if is_code else self.scales[k - 1 - self.first]
        if self.is_residual and not is_code:
            maps = apply_to_axes(running, area_matrix(self.scales[-1], side))
        else:
            unit = tokens.reshape(tokens.shape[0], below, below, -1)
            maps = unit if side == below else apply_to_axes(unit, bicubic_matrix(below, side))
        flat = maps.reshape(maps.shape[0], side * side, -1)
        if self.coarse is not None:
            others = self.scale_mean[...].shape[-1] if is_code else self.coarse.channels
            empty = jnp.zeros((*flat.shape[:2], others), jnp.float32)
            flat = jnp.concatenate([empty, flat] if is_code else [flat, empty], axis=-1)
        kept = jnp.broadcast_to(kept_B[:, None, None], (*flat.shape[:2], 1))
        return jnp.concatenate([flat, kept], axis=-1)


def _clean(tokens: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return tokens, jnp.ones(tokens.shape[:1], jnp.float32)


def make_continuous_next_scale(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> ContinuousNextScaleGenerator:
    """Make the generator for the continuous level of a tokenizer, and for the coarse ids in front of it if any."""
    generator, own = config.generator, config.generator.backbone
    levels, pyramid = kinds.levels(config), config.generator.pyramid
    fine, first = spec.levels[-1], kinds.pyramid_first(config)
    books = config.tokenizer.coarse
    coarse = CoarseScales([it.grid for it in first], books.codes, books.code_channels, rngs=rngs) if first else None
    has_copies, copies = generator.aggregate.streams > 1, dataclasses.asdict(generator.aggregate)
    backbone = (functools.partial(ParallelBackbone, **copies) if has_copies else NextScaleBackbone)(
        trunk_of(own, dtype),
        scales=tuple(level.grid for level in levels),
        input_channels=fine.size + (books.code_channels if first else 0) + 1,
        classes=classes,
        drop_path=own.drop_path,
        use_unit_attention=own.use_unit_attention,
        use_shared_modulation=own.use_shared_modulation,
        gate_init=own.gate_init,
        rngs=rngs,
    )
    energy: dict[str, Any] = dataclasses.asdict(generator.energy) | dict(hidden_width=own.width, dtype=dtype)

    def head(channels: int) -> EnergyHead:
        if pyramid.head == "token":
            return EnergyHead(channels=channels, **energy, rngs=rngs)
        heads = pyramid.attention_heads
        return JointEnergyHead(channels=channels, windows=pyramid.windows, attention_heads=heads, **energy, rngs=rngs)

    return ContinuousNextScaleGenerator(
        backbone=backbone,
        heads=[head(size) for size in dict.fromkeys(level.size for level in levels[len(first) :])],
        scales=kinds.pyramid_scales(config),
        levels=levels,
        patch_size=generator.patch_size,
        targets=pyramid.targets,
        context_noise=pyramid.context_noise,
        own_context_probability=pyramid.own_context_probability,
        scale_weight_power=pyramid.scale_weight_power,
        least_draws=pyramid.least_draws,
        label_drop=generator.label_drop,
        coarse=coarse,
        coarse_heads=coarse_heads(len(first), own.width, books.codes, generator.softmax.label_smoothing, rngs),
    )
