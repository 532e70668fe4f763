"""What is minimised to train a tokenizer: reconstruction, latent, perceptual and adversarial terms in one scalar."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.tokenizers.adversarial import AdversarialLoss
from ear_jax.tokenizers.codebook import usage
from ear_jax.tokenizers.latents import sample_gaussian
from ear_jax.tokenizers.lite_hybrid import HybridTraining, LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.losses import gaussian_loss, kl_to_unit_normal, masked_mean, psnr, wavelet_loss
from ear_jax.tokenizers.perceptual import load_perceptual
from ear_jax.types import Metrics


class TokenizerObjective(nnx.Module):
    """A tokenizer with the weights of its losses; a term of weight 0 is not computed.

    Before `hybrid_start_steps` the tokenizer trains as a plain VAE. From then on the hybrid path runs, and each image
    drops its fine branch with `coarse_only_probability`, so that coarse tokens alone decode to the structure. The KL
    is that of the VAE's posterior first, of the fine tokens' posterior (which fixes their scale) afterwards.
    """

    def __init__(
        self,
        tokenizer: LiteVAE | LiteHybrid,
        *,
        l1: float = 1.0,
        l2: float = 0.0,
        wavelet: float = 0.0,
        gaussian: float = 0.0,
        kl: float = 0.0,
        commitment: float = 0.0,
        lpips: float = 0.0,
        vgg_weights: str = "",
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
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        latent_rng, drop_rng = jax.random.split(rng)
        vae = self.tokenizer.vae if isinstance(self.tokenizer, LiteHybrid) else self.tokenizer
        mean, logvar = vae.encoder(images)
        metrics: Metrics = {}
        use_fine = jnp.ones((images.shape[0],), jnp.float32)
        if isinstance(self.tokenizer, LiteHybrid):
            is_hybrid = step >= self.hybrid_start_steps
            dropped = jax.random.bernoulli(drop_rng, self.coarse_only_probability, use_fine.shape) & is_hybrid
            use_fine = 1.0 - dropped.astype(jnp.float32)
            passed = self._hybrid(self.tokenizer, mean, logvar, use_fine, is_hybrid, latent_rng)
            metrics.update(self._codebook_metrics(self.tokenizer))
            latent, kl_mean, commitment = passed.latent, passed.fine_mean, passed.commitment
        else:
            latent, kl_mean, commitment = sample_gaussian(latent_rng, mean, logvar), mean, None
        reconstructions = vae.decoder(latent)

        terms = self._reconstruction_terms(reconstructions, images)
        if self.kl > 0:
            terms["kl"] = (self.kl, kl_to_unit_normal(kl_mean, logvar))
        if commitment is not None and self.commitment > 0:
            terms["commitment"] = (self.commitment, commitment)
        total = sum((weight * term for weight, term in terms.values()), start=jnp.zeros(()))
        metrics.update({f"loss/{name}": term for name, (_, term) in terms.items()})
        if self.adversarial is not None:
            game, game_terms = self.adversarial(images, reconstructions, step)
            total = total + game
            metrics.update({f"loss/{name}": term for name, term in game_terms.items()})

        quality = jax.lax.stop_gradient(psnr(reconstructions, images))
        metrics["psnr"] = masked_mean(quality, use_fine)
        if isinstance(self.tokenizer, LiteHybrid):
            metrics["psnr_coarse"] = masked_mean(quality, 1.0 - use_fine)
        return total, metrics

    def _hybrid(
        self,
        tokenizer: LiteHybrid,
        mean: jax.Array,
        logvar: jax.Array,
        use_fine: jax.Array,
        is_hybrid: jax.Array,
        rng: jax.Array,
    ) -> HybridTraining:
        """Run the hybrid path, or hold it back before its start, and store the moved codebooks.

        Both paths are computed and one is selected: the hybrid one adds little, and XLA's CPU backend runs what stands
        inside a conditional about three times slower.
        """
        passed = tokenizer.train_latent(mean, logvar, use_fine, rng, is_active=is_hybrid)
        if self.hybrid_start_steps > 0:
            plain = HybridTraining(sample_gaussian(rng, mean, logvar), mean, jnp.zeros(()), tokenizer.coarse.books)
            passed = jax.tree.map(lambda active, waiting: jnp.where(is_hybrid, active, waiting), passed, plain)
        tokenizer.coarse.assign_books(jax.lax.stop_gradient(passed.books))
        return passed

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

    def _reconstruction_terms(
        self, reconstructions: jax.Array, images: jax.Array
    ) -> dict[str, tuple[float, jax.Array]]:
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
        return terms
