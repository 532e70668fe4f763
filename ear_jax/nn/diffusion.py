"""Gaussian diffusion: tables in float64 on the host, noising, losses and reverse steps as functions of given noise.

The network predicts [noise | variance] on the last axis. The variance is learned as a place between the two bounds of
the step's variance (Nichol & Dhariwal, arXiv 2102.09672, section 3.1).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCHEDULES = ("cosine", "linear")
SAMPLERS = ("ddpm", "ddim")

Steps = Int[Array, "..."] | int
"""Steps of a process, 0 the least noisy; their axes are the first ones of the values they belong to."""


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """The tables of a diffusion process, one entry a step, float64.

    Attributes:
        betas: Variance that each step adds.
        alphas_cumprod: Share of the signal's variance that is left after each step.
        trained_steps: int32, the step of the trained process that each step stands for; what the network is told.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    trained_steps: np.ndarray

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod_previous(self) -> np.ndarray:
        """`alphas_cumprod` of one step less, 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Factors of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        previous, left = self.alphas_cumprod_previous, 1.0 - self.alphas_cumprod
        return self.betas * np.sqrt(previous) / left, (1.0 - previous) * np.sqrt(1.0 - self.betas) / left

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Log variance of q(x_{t-1} | x_t, x_0); the first, which would be log 0, repeats the second."""
        variance = self.betas * (1.0 - self.alphas_cumprod_previous) / (1.0 - self.alphas_cumprod)
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(variance)


@functools.cache
def make_process(schedule: str, train_steps: int) -> Process:
    """Return the process a network is trained on.

    `linear` is DiT's (beta from 1e-4 to .02 at 1000 steps), `cosine` MAR's (Nichol & Dhariwal's, beta at most .999).

    Raises:
        ValueError: the schedule is unknown or there is no step.
    """
    if train_steps < 1:
        raise ValueError(f"a diffusion process of {train_steps} steps; expected at least 1")
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, train_steps) * (1000 / train_steps)
    elif schedule == "cosine":
        ends = np.arange(train_steps + 1) / train_steps
        left = np.asarray([math.cos((end + 0.008) / 1.008 * math.pi / 2) ** 2 for end in ends])
        betas = np.minimum(1.0 - left[1:] / left[:-1], 0.999)
    else:
        raise ValueError(f"noise schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
    return Process(betas, np.cumprod(1.0 - betas), np.arange(train_steps, dtype=np.int32))


@functools.cache
def respace(schedule: str, train_steps: int, steps: int, *, use_integer_stride: bool = False) -> Process:
    """Return a shorter process through `steps` of the trained steps.

    They run evenly from the first to the last, rounded to even at halves; with `use_integer_stride` from the first
    on by the smallest whole stride that gives so many, as DDIM's authors do. One single step is the last.

    Raises:
        ValueError: there are not so many steps, or no whole stride gives their number.
    """
    trained = make_process(schedule, train_steps)
    if not 1 <= steps <= train_steps:
        raise ValueError(f"{steps} sampling steps of a process of {train_steps}; expected 1 to {train_steps}")
    kept = _strided(train_steps, steps) if use_integer_stride else _even(train_steps, steps)
    left = trained.alphas_cumprod[kept]
    betas = 1.0 - left / np.append(1.0, left[:-1])
    return Process(betas, np.cumprod(1.0 - betas), np.asarray(kept, np.int32))


def _even(train_steps: int, steps: int) -> list[int]:
    if steps == 1:
        return [train_steps - 1]
    stride, place, kept = (train_steps - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        kept.append(round(place))
        place += stride  # summed up as in the reference: a product would round some halves otherwise
    return kept


def _strided(train_steps: int, steps: int) -> list[int]:
    if steps == 1:
        return [train_steps - 1]
    for stride in range(1, train_steps):
        if len(range(0, train_steps, stride)) == steps:
            return list(range(0, train_steps, stride))
    raise ValueError(
        f"no whole stride takes {steps} of {train_steps} steps, which sampler=ddim needs; "
        f"use a divisor of {train_steps}, or sampler=ddpm"
    )


def q_sample(process: Process, clean: Float[Array, "*shape"], steps: Steps, noise: Float[Array, "*shape"]) -> jax.Array:
    """Return x_t of `clean` x_0, float32."""
    signal = _at(np.sqrt(process.alphas_cumprod), steps, clean)
    return signal * clean + _at(np.sqrt(1.0 - process.alphas_cumprod), steps, clean) * noise


def q_posterior_mean(process: Process, clean: jax.Array, state: jax.Array, steps: Steps) -> jax.Array:
    """Return the mean of q(x_{t-1} | x_t, x_0)."""
    of_clean, of_state = process.posterior_mean_coefficients
    return _at(of_clean, steps, state) * clean + _at(of_state, steps, state) * state


def p_mean_variance(
    process: Process, output: jax.Array, state: jax.Array, steps: Steps, *, clip_denoised: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean and log variance of p(x_{t-1} | x_t), and the x_0 they rest on, clipped to [-1, 1] if asked to."""
    noise, variance = jnp.split(output, 2, axis=-1)
    upper = 0.5 * (variance + 1.0)
    bounds = np.log(process.betas), process.posterior_log_variance
    log_variance = upper * _at(bounds[0], steps, state) + (1.0 - upper) * _at(bounds[1], steps, state)
    left = process.alphas_cumprod
    clean = _at(np.sqrt(1.0 / left), steps, state) * state - _at(np.sqrt(1.0 / left - 1.0), steps, state) * noise
    clean = jnp.clip(clean, -1.0, 1.0) if clip_denoised else clean
    return q_posterior_mean(process, clean, state, steps), log_variance, clean


def training_losses(
    process: Process,
    output: Float[Array, "*batch E"],
    clean: Float[Array, "*batch D"],
    steps: Steps,
    noise: Float[Array, "*batch D"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """Return the two terms of the loss, element by element: mean them over what shares a step, then add them.

    The first is the squared error of the noise. The second, in bits, is the variational bound: KL divergence of the
    step, or the negative log likelihood of the 1/255-wide bin around x_0 at step 0 (DiT and MAR take it for latents
    too). It trains the variance only: its gradient does not reach the noise.
    """
    predicted, variance = jnp.split(output, 2, axis=-1)
    state = q_sample(process, clean, steps, noise)
    frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), variance], axis=-1)
    mean, log_variance, _ = p_mean_variance(process, frozen, state, steps)
    true_mean = q_posterior_mean(process, clean, state, steps)
    true_log_variance = _at(process.posterior_log_variance, steps, state)
    difference = true_log_variance - log_variance
    squared = jnp.square(true_mean - mean)
    divergence = 0.5 * (jnp.exp(difference) - 1.0 - difference + squared * jnp.exp(-log_variance))
    likelihood = binned_log_likelihood(clean, mean, 0.5 * log_variance)
    is_first = jnp.asarray(steps).reshape(jnp.shape(steps) + (1,) * (clean.ndim - jnp.ndim(steps))) == 0
    bound = jnp.where(is_first, -likelihood, divergence) / math.log(2.0)
    return jnp.square(predicted - noise), bound


def binned_log_likelihood(values: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Return the log probability (nats) that a normal puts on the bin of width 2/255 around each value.

    Bins beyond ±.999 are open; the cumulative distribution is the tanh approximation, probabilities are at least 1e-12.
    """
    scale = jnp.exp(-log_std)
    above = _normal_cdf(scale * (values - mean + 1.0 / 255.0))
    below = _normal_cdf(scale * (values - mean - 1.0 / 255.0))
    probability = jnp.where(values < -0.999, above, jnp.where(values > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def guided(
    conditional: Float[Array, "*batch E"],
    unconditional: Float[Array, "*batch E"],
    guidance_scale: jax.Array | float,
    channels: int,
) -> Float[Array, "*batch E"]:
    """Mix two outputs, s * conditional + (1 - s) * unconditional, in the first `channels`; the rest is conditional's.

    The variance, behind the noise, is never guided.
    """
    mixed = unconditional + guidance_scale * (conditional - unconditional)
    return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1)


def reverse_step(
    process: Process,
    output: jax.Array,
    state: jax.Array,
    step: Int[Array, ""] | int,
    noise: jax.Array,
    *,
    sampler: str = "ddpm",
    temperature: jax.Array | float = 1.0,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return x_{t-1} and the x_0 predicted on the way; `noise` has no weight at step 0.

    `ddpm` draws from p(x_{t-1} | x_t), `ddim` is equation 12 of Song et al. (arXiv 2010.02502), which at eta = 0 takes
    no noise. `temperature` scales the noise.

    Raises:
        ValueError: the sampler is unknown.
    """
    mean, log_variance, clean = p_mean_variance(process, output, state, step, clip_denoised=clip_denoised)
    if sampler == "ddpm":
        std = jnp.where(jnp.asarray(step) > 0, jnp.exp(0.5 * log_variance), 0.0)
        return mean + temperature * std * noise, clean
    if sampler != "ddim":
        raise ValueError(f"sampler {sampler!r} is unknown; known: {', '.join(SAMPLERS)}")
    left, previous = process.alphas_cumprod, process.alphas_cumprod_previous
    sigma = eta * np.sqrt((1.0 - previous) / (1.0 - left)) * np.sqrt(1.0 - left / previous)
    # The noise that belongs to x_0, which differs from the predicted one where x_0 was clipped.
    implied = (_at(np.sqrt(1.0 / left), step, state) * state - clean) / _at(np.sqrt(1.0 / left - 1.0), step, state)
    towards = _at(np.sqrt(np.maximum(1.0 - previous - sigma**2, 0.0)), step, state)
    mean = _at(np.sqrt(previous), step, state) * clean + towards * implied
    return mean + temperature * _at(sigma, step, state) * noise, clean


def reverse(
    process: Process,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    start: Float[Array, "*shape"],
    noise_at: Callable[[jax.Array], jax.Array],
    *,
    sampler: str = "ddpm",
    temperature: jax.Array | float = 1.0,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Float[Array, "*shape"]:
    """Run a process from `start` (x_T) down to x_0 by one scan.

    Args:
        process: its steps are taken from the last to the first.
        denoise: (state, step of this process) -> [noise | variance], float32.
        start: standard normal.
        noise_at: step -> standard normal of the same shape.
        sampler: see `reverse_step`, as the options that follow.
        temperature: scales the noise of the steps, not `start`.
        eta: share of the noise in `ddim`.
        clip_denoised: keep each predicted x_0 in [-1, 1].
    """
    options = {"sampler": sampler, "temperature": temperature, "eta": eta, "clip_denoised": clip_denoised}

    def body(state: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        return reverse_step(process, denoise(state, step), state, step, noise_at(step), **options)[0], None

    return jax.lax.scan(body, start, jnp.arange(len(process))[::-1])[0]


def keyed_noise(keys_B: jax.Array, shape: tuple[int, ...]) -> Callable[[jax.Array | int], jax.Array]:
    """Return step -> standard normal [B, *shape], where image b uses `keys_B[b]` alone; step T is for the start."""
    return lambda step: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(
        keys_B
    )


def _at(table: np.ndarray, steps: Steps, like: jax.Array) -> jax.Array:
    values = jnp.asarray(table, jnp.float32)[jnp.asarray(steps)]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _normal_cdf(values: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values**3)))
