"""What is minimised to train a tokenizer: reconstruction, latent, perceptual and adversarial terms in one scalar."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.nn.perceptual import EfficientNetDistance, load_perceptual
from ear_jax.nn.resize import to_signed
from ear_jax.tokenizers.adversarial import AdversarialLoss
from ear_jax.tokenizers.codebook import usage
from ear_jax.tokenizers.latents import GaussianTokenizer, sample_gaussian
from ear_jax.tokenizers.lite_hybrid import HybridTraining, LiteHybrid
from ear_jax.tokenizers.losses import gaussian_loss, kl_to_unit_normal, masked_mean, psnr, wavelet_loss
from ear_jax.tokenizers.vqvae import VQVAE, ContinuousVQVAE, HartTokenizer
from ear_jax.types import Metrics
from ear_jax.weights.installed import efficientnet_arrays

FEATURE_DISTANCES: dict[str, Callable[[], nnx.Module]] = {
    "efficientnet_lite0": lambda: EfficientNetDistance(efficientnet_arrays())
}
"""What `loss.perceptual` measures by, made with its weights."""

Terms = dict[str, tuple[float, jax.Array]]
"""Weight and value of each term of the loss."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a tokenizer's training pass gives: reconstructions, the latent's terms, and whether images drop detail."""

    images: jax.Array
    terms: Terms
    metrics: Metrics = dataclasses.field(default_factory=dict)
    drops_fine: bool = False


class TokenizerObjective(nnx.Module):
    """A tokenizer with the weights of its losses; a term of weight 0 is not computed.

    Before `hybrid_start_steps` the tokenizer trains as a plain VAE. From then on the hybrid path runs, and each image
    drops its fine branch with `coarse_only_probability`, so that coarse tokens alone decode to the structure. The KL
    is that of the VAE's posterior first, of the fine tokens' posterior (which fixes their scale) afterwards. HART's
    tokenizer drops its residual by the same probability.
    """

    def __init__(
        self,
        tokenizer: GaussianTokenizer | LiteHybrid | VQVAE,
        *,
        l1: float = 1.0,
        l2: float = 0.0,
        wavelet: float = 0.0,
        gaussian: float = 0.0,
        kl: float = 0.0,
        commitment: float = 0.0,
        lpips: float = 0.0,
        vgg_weights: str = "",
        perceptual: float = 0.0,
        perceptual_network: str = "efficientnet_lite0",
        adversarial: float = 0.0,
        adversarial_start_steps: int = 0,
        adversarial_channels: int = 64,
        r1: float = 0.0,
        lecam: float = 0.0,
        hybrid_start_steps: int = 0,
        coarse_only_probability: float = 0.5,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.tokenizer = tokenizer
        self.l1, self.l2, self.wavelet, self.gaussian = l1, l2, wavelet, gaussian
        self.kl, self.commitment, self.lpips = kl, commitment, lpips
        self.hybrid_start_steps = hybrid_start_steps
        self.coarse_only_probability = coarse_only_probability
        self.perceptual = load_perceptual(vgg_weights) if lpips > 0 else None
        self.perceptual_weight = perceptual
        self.feature_distance = FEATURE_DISTANCES[perceptual_network]() if perceptual > 0 else None
        game = None
        if adversarial > 0:
            game = AdversarialLoss(
                weight=adversarial,
                start_steps=adversarial_start_steps,
                channels=adversarial_channels,
                r1=r1,
                lecam=lecam,
                dtype=dtype,
                rngs=rngs,
            )
        self.adversarial = game

    def loss(
        self,
        batch: Mapping[str, Array],
        rng: jax.Array,
        step: Int[Array, ""],
        controls: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the weighted loss of a batch and its metrics; moves the codebooks and the LeCam anchors.

        `batch["image"]` is uint8 [B, h, w, 3]. Metrics hold every active term unweighted as `loss/NAME`, `psnr` (dB,
        images that kept their fine branch), and for Lite-Hybrid `psnr_coarse` (those that dropped it; 0 when there
        were none) and `codebook/usage`, `codebook/perplexity`. `controls` has nothing for a tokenizer.
        """
        del controls
        images = to_signed(batch["image"])
        latent_rng, drop_rng = jax.random.split(rng)
        is_hybrid = step >= self.hybrid_start_steps
        dropped = (
            jax.random.bernoulli(drop_rng, jnp.float32(self.coarse_only_probability), images.shape[:1]) & is_hybrid
        )
        use_fine = 1.0 - dropped.astype(jnp.float32)
        if isinstance(self.tokenizer, LiteHybrid):
            passed = self._hybrid(self.tokenizer, images, use_fine, is_hybrid, latent_rng)
        elif isinstance(self.tokenizer, VQVAE):
            passed = self._quantised(self.tokenizer, images, use_fine)
        elif isinstance(self.tokenizer, ContinuousVQVAE):
            # Without spread there is no KL to a normal.
            passed = Pass(self.tokenizer.decoder(self.tokenizer.encoder(images)), {})
        else:
            passed = self._plain(self.tokenizer, images, latent_rng)
        terms = {**self._reconstruction_terms(passed.images, images), **passed.terms}
        total = sum((weight * term for weight, term in terms.values()), start=jnp.zeros((), jnp.float32))
        metrics = {**passed.metrics, **{f"loss/{name}": term for name, (_, term) in terms.items()}}
        if self.adversarial is not None:
            game, game_terms = self.adversarial(images, passed.images, step)
            total = total + game
            metrics.update({f"loss/{name}": term for name, term in game_terms.items()})

        quality = jax.lax.stop_gradient(psnr(passed.images, images))
        if passed.drops_fine:
            metrics["psnr"] = masked_mean(quality, use_fine)
            metrics["psnr_coarse"] = masked_mean(quality, 1.0 - use_fine)
        else:
            metrics["psnr"] = quality.mean()
        return total, metrics

    def _plain(self, tokenizer: GaussianTokenizer, images: jax.Array, rng: jax.Array) -> Pass:
        mean, logvar = tokenizer.encoder(images)
        return Pass(tokenizer.decoder(sample_gaussian(rng, mean, logvar)), self._kl(mean, logvar))

    def _quantised(self, tokenizer: VQVAE, images: jax.Array, use_fine: jax.Array) -> Pass:
        """Run a multi-scale quantiser; HART's keeps its continuous residual for the images of `use_fine` 1."""
        features = tokenizer.encoder(images)
        drops_fine = isinstance(tokenizer, HartTokenizer)
        if isinstance(tokenizer, HartTokenizer):
            trained = tokenizer.train_latent(features, use_fine)
        else:
            trained = tokenizer.train_latent(features)
        terms = {"quantiser": (1.0, trained.loss)}  # holds the commitment by its weight
        return Pass(tokenizer.decoder(trained.map), terms, {"codebook/usage": trained.usage}, drops_fine)

    def _hybrid(
        self, tokenizer: LiteHybrid, images: jax.Array, use_fine: jax.Array, is_hybrid: jax.Array, rng: jax.Array
    ) -> Pass:
        """Run the hybrid path, or hold it back before its start, and store the moved codebooks.

        Both paths are computed and one is selected: the hybrid one adds little, and XLA's CPU backend runs what stands
        inside a conditional about three times slower.
        """
        mean, logvar = tokenizer.vae.encoder(images)
        passed = tokenizer.train_latent(mean, logvar, use_fine, rng, is_active=is_hybrid)
        if self.hybrid_start_steps > 0:
            plain = HybridTraining(
                sample_gaussian(rng, mean, logvar), mean, jnp.zeros((), jnp.float32), tokenizer.coarse.books
            )
            passed = jax.tree.map(lambda active, waiting: jnp.where(is_hybrid, active, waiting), passed, plain)
        tokenizer.coarse.assign_books(jax.lax.stop_gradient(passed.books))
        terms = self._kl(passed.fine_mean, logvar)
        if self.commitment > 0:
            terms["commitment"] = (self.commitment, passed.commitment)
        return Pass(tokenizer.vae.decoder(passed.latent), terms, self._codebook_metrics(tokenizer), drops_fine=True)

    def _kl(self, mean: jax.Array, logvar: jax.Array) -> Terms:
        return {"kl": (self.kl, kl_to_unit_normal(mean, logvar))} if self.kl > 0 else {}

    def _codebook_metrics(self, tokenizer: LiteHybrid) -> Metrics:
        measured = [usage(book) for book in tokenizer.coarse.books]
        metrics = {
            "codebook/usage": jnp.stack([used for used, _ in measured]).mean(),
            "codebook/perplexity": jnp.stack([perplexity for _, perplexity in measured]).mean(),
        }
        if len(measured) > 1:
            for grid, (used, perplexity) in zip(tokenizer.coarse.grids, measured, strict=True):
                metrics[f"codebook/usage_{grid}"] = used
                metrics[f"codebook/perplexity_{grid}"] = perplexity
        return metrics

    def _reconstruction_terms(self, reconstructions: jax.Array, images: jax.Array) -> Terms:
        error = reconstructions - images
        terms = {}
        if self.l1 > 0:
            terms["l1"] = (self.l1, jnp.mean(jnp.abs(error)))
        if self.l2 > 0:
            terms["l2"] = (self.l2, jnp.mean(jnp.square(error)))
        if self.wavelet > 0:
            terms["wavelet"] = (self.wavelet, wavelet_loss(error))
        if self.gaussian > 0:
            terms["gaussian"] = (self.gaussian, gaussian_loss(error))
        if self.perceptual is not None:
            terms["lpips"] = (self.lpips, jnp.mean(self.perceptual(reconstructions, images)))
        if self.feature_distance is not None:
            distance = self.feature_distance(reconstructions, images)
            terms["perceptual"] = (self.perceptual_weight, jnp.mean(distance))
        return terms
