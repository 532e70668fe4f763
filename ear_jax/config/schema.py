"""The whole configuration as frozen dataclasses: every key, its type, its range, its meaning.

No jax here: a configuration error must stop a run before anything heavy is imported. How a config file
becomes these objects is `read.py`; what one key implies for another is `validate.py`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ear_jax.sampling import SCHEDULES

USES = ("sample", "evaluate", "bench")
"""Tasks that use a finished model."""

IMAGES = "images"
"""Beside them, in `read_by`: the scoring of `config.evaluate.images`, which reads no model."""

KINDS: dict[str, Any] = {}
"""Kinds of generator by the name that chooses one; `kinds.py` fills the table."""


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Collection[str] = (),
    above: float | None = None,
    below: float | None = None,
    affects_result: bool = True,
    read_by: Collection[str] | None = None,
    is_asked: bool | None = None,
) -> Any:
    """Declare one config key: default, meaning and range (`low`, `high` inclusive, `above`, `below` exclusive).

    Without `affects_result` it only changes how a stage is run or watched: a stage goes on when it has changed.
    `read_by` are those of `USES`, and `IMAGES`, that read it when nothing is trained; the others refuse it. A key that
    `is_asked` is of the call that gives it, and not of the run. What is not said of a key is said of its group.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": choices,
        "affects_result": affects_result,
        "read_by": read_by,
        "is_asked": is_asked,
    }
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type, *, read_by: Collection[str] | None = None, is_asked: bool | None = None) -> Any:
    """Declare a nested group of keys whose defaults are those of `cls`; `read_by` and `is_asked` are as in `key`."""
    return dataclasses.field(default_factory=cls, metadata={"read_by": read_by, "is_asked": is_asked})


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The procedural data set: how many degrees of freedom its pictures have."""

    images: int = key(20_000, "number of training images", low=1)
    classes: int = key(6, "shape classes, the first n of the ten", low=1, high=10)
    colors: int = key(4, "foreground colours, the first n; 0 draws any RGB colour", low=0, high=8)
    backgrounds: int = key(2, "background colours, the first n; 0 draws any RGB colour", low=0, high=8)
    position_jitter: float = key(0.06, "centre offset, as a fraction of the side", low=0.0, high=0.5)
    size_low: float = key(0.30, "smallest radius, as a fraction of the side", above=0.0, high=0.5)
    size_high: float = key(0.36, "largest radius, as a fraction of the side", above=0.0, high=0.5)
    use_rotation: bool = key(False, "rotate each shape by a random angle")
    use_gradient: bool = key(False, "shade the background by a random linear gradient")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become fixed-size arrays."""

    source: str = key("shapes", "shapes | folder:PATH | tfds:NAME")
    tfds_directory: str = key("", "folder that --task=prepare writes and tfds: reads; empty = ~/tensorflow_datasets")
    image_px: int = key(32, "side of the square training images", low=8, high=4096, read_by=(IMAGES,))
    use_flip: bool = key(True, "mirror images left-right with probability one half")
    eval_images: int = key(1_000, "images held out for evaluation, at most", low=1)
    eval_fraction: float = key(0.05, "fraction held out when a folder has no test or val split", above=0.0, below=1.0)
    layout: str = key(
        "auto",
        "what the sub-folders of folder:PATH are; auto refuses what could be either",
        choices=("auto", "classes", "splits"),
        affects_result=False,
    )
    class_order: str = key(
        "auto",
        "order of class folders: auto sorts whole numbers as numbers, text never does, as in earlier versions",
        choices=("auto", "text"),
        affects_result=False,
    )
    use_exif_orientation: bool = key(False, "rotate as the EXIF tag says (reference pipelines ignore it)")
    alpha_background: int = key(255, "grey level that transparent pixels are composited onto", low=0, high=255)
    min_side_px: int = key(2, "images with a shorter side are quarantined", low=1)
    max_pixels: int = key(64_000_000, "images with more pixels are quarantined unread", low=1)
    max_bad_fraction: float = key(
        0.01, "fraction of damaged files above which the run fails", low=0.0, high=1.0, affects_result=False
    )
    decode_threads: int = key(4, "threads that read and decode", low=1, high=256, affects_result=False)
    prefetch_batches: int = key(4, "batches prepared ahead", low=1, high=64, affects_result=False)
    cache_mib: int = key(
        512, "decoded images are kept in memory when they all fit into this; 0 = never", low=0, affects_result=False
    )
    shapes: ShapesConfig = group(ShapesConfig)


@dataclasses.dataclass(frozen=True)
class LiteVAEConfig:
    """The wavelet autoencoder."""

    encoder: str = key("s", "named encoder size, or custom", choices=("s", "b", "m", "l", "compact", "custom"))
    wavelet_levels: int = key(3, "Haar levels; the downsampling factor is 2 to this power", low=1, high=6)
    latent_channels: int = key(12, "channels of the latent", low=1, high=1024)
    encoder_channels: int = key(16, "custom: base channels of the encoder", low=1)
    encoder_multipliers: tuple[int, ...] = key((1, 2, 2), "custom: channel multipliers of each feature UNet")
    encoder_blocks: int = key(1, "custom: residual blocks per UNet level", low=1, high=16)
    decoder_channels: int = key(128, "base channels of the decoder", low=1)
    decoder_multipliers: tuple[int, ...] = key((1, 2, 4, 4), "channel multipliers from the image side inwards")
    decoder_blocks: int = key(2, "residual blocks per decoder level", low=1, high=16)
    decoder_attention: bool = key(True, "self-attention at the decoder's lowest resolution")
    decoder_norm: str = key(
        "self_modulated", "self_modulated convolutions or group normalisation", choices=("self_modulated", "group")
    )
    decoder_output: str = key(
        "image",
        "last layer: pixels, or the Haar bands of them at half the side (one decoder level less)",
        choices=("image", "wavelet"),
    )
    conv_groups: int = key(1, "groups of the 3x3 convolutions in the decoder (compact uses more)", low=1)
    conv_rank: int = key(0, "rank of the low-rank pointwise convolutions; 0 = full rank", low=0)


@dataclasses.dataclass(frozen=True)
class CoarseConfig:
    """The discrete coarse levels of Lite-Hybrid."""

    grids: tuple[int, ...] = key((4,), "side of each coarse grid, coarsest first; more than one makes a pyramid")
    codes: int = key(1024, "codebook size", low=2, high=1 << 20)
    code_channels: int = key(32, "channels of a code", low=1)
    initialisation: str = key("kmeans", "how the codebook starts", choices=("kmeans", "data", "normal"))
    decay: float = key(0.99, "exponential decay of the codebook's running sums", low=0.0, below=1.0)
    revive_below: float = key(0.03, "codes used less than this fraction of a fair share are revived", low=0.0)


@dataclasses.dataclass(frozen=True)
class FineConfig:
    """The UNet that turns the residual into fine tokens."""

    channels: int = key(64, "base channels", low=1)
    multipliers: tuple[int, ...] = key((1, 2), "channel multipliers, down then up")
    blocks: int = key(1, "residual blocks per level", low=1, high=16)


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
    """Weight of each term of the tokenizer's loss; 0 switches a term off."""

    l1: float = key(1.0, "mean absolute error", low=0.0)
    l2: float = key(0.0, "mean squared error", low=0.0)
    wavelet: float = key(0.1, "Charbonnier on the high-frequency Haar bands", low=0.0)
    gaussian: float = key(0.1, "L1 on the Gaussian high-pass", low=0.0)
    kl: float = key(1e-6, "KL of the posterior to the unit normal, per latent element; none in vqvae, hart", low=0.0)
    commitment: float = key(0.25, "pull of the encoder towards its codes", low=0.0)
    lpips: float = key(0.0, "LPIPS distance; needs vgg_weights", low=0.0)
    vgg_weights: str = key("", "file with the VGG16 and LPIPS weights (safetensors)")
    perceptual: float = key(0.0, "feature distance at several depths of perceptual_network (extra `judge`)", low=0.0)
    perceptual_network: str = key("efficientnet_lite0", "network of that distance", choices=("efficientnet_lite0",))
    adversarial: float = key(0.0, "UNet discriminator, constant weight", low=0.0)
    adversarial_start_steps: int = key(0, "step at which the discriminator enters", low=0)
    adversarial_channels: int = key(64, "base channels of the discriminator", low=1)
    r1: float = key(0.0, "R1 gradient penalty on real images", low=0.0)
    lecam: float = key(0.0, "LeCam regularisation of the discriminator", low=0.0)


@dataclasses.dataclass(frozen=True)
class KLVAEConfig:
    """The convolutional autoencoders of the published systems: KL-16 (MAR, EAR) and Stable Diffusion's KL-f8 (DiT)."""

    channels: int = key(128, "base channels", low=1)
    multipliers: tuple[int, ...] = key((1, 1, 2, 2, 4), "channel multipliers from the image side inwards")
    blocks: int = key(2, "residual blocks per encoder level; the decoder has one more", low=1, high=16)
    latent_channels: int = key(16, "channels of the latent", low=1, high=1024)
    encoder_attention: bool = key(True, "attention after each block of the encoder's last level, besides the middle")
    decoder_attention: bool = key(False, "attention after each block of the decoder's first level, besides the middle")


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """The multi-scale vector-quantised autoencoder of VAR, and of HART with its continuous residual."""

    channels: int = key(160, "base channels", low=1)
    multipliers: tuple[int, ...] = key((1, 1, 2, 2, 4), "channel multipliers from the image side inwards")
    blocks: int = key(2, "residual blocks per encoder level; the decoder has one more", low=1, high=16)
    latent_channels: int = key(32, "channels of the latent and of a code", low=1, high=1024)
    codes: int = key(4096, "codebook size", low=2, high=1 << 20)
    scales: tuple[int, ...] = key((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), "sides of the scales, coarsest first")
    residual_convolutions: int = key(4, "convolutions shared by the scales; 0 = one of its own for each", low=0)
    residual_ratio: float = key(0.5, "weight of the convolution in each scale's residual map", low=0.0, high=1.0)
    use_cosine: bool = key(False, "choose codes by cosine instead of distance")
    use_codebook: bool = key(
        True, "false: no codes and no scales; the encoder's output is one continuous level (vqvae, not hart)"
    )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: the project's own (lite_*) or one of the published systems'."""

    name: str = key("lite_hybrid", "tokenizer", choices=("lite_hybrid", "lite_vae", "kl_vae", "vqvae", "hart"))
    source: str = key("", "model folder whose tokenizer is taken as it is; empty = train one")
    start_from: str = key("", "model folder or .safetensors that gives the first weights; empty = none")
    vae: LiteVAEConfig = group(LiteVAEConfig)
    kl_vae: KLVAEConfig = group(KLVAEConfig)
    vqvae: VQVAEConfig = group(VQVAEConfig)
    coarse: CoarseConfig = group(CoarseConfig)
    fine: FineConfig = group(FineConfig)
    fusion: str = key(
        "mlp", "how coarse and fine are joined", choices=("none", "mlp", "mlp_layernorm", "attention", "channel_weight")
    )
    hybrid_start_steps: int = key(0, "steps trained as a plain VAE before the coarse branch starts", low=0)
    coarse_only_probability: float = key(
        0.5, "probability that an image drops its fine branch in training", low=0.0, high=1.0
    )
    loss: TokenizerLossConfig = group(TokenizerLossConfig)


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    """How one level of the image is masked in training and drawn in sampling."""

    steps: int = key(1, "backbone passes that draw this level", low=1, high=4096, affects_result=False, read_by=USES)
    mask_ratio: str = key(
        "truncated_normal",
        "distribution of the masked fraction in training",
        choices=("truncated_normal", "uniform", "cosine", "full"),
    )
    mask_ratio_low: float = key(0.7, "lower end of the masked fraction", low=0.0, high=1.0)
    mask_ratio_std: float = key(0.25, "spread of the truncated normal around 1", above=0.0)
    full_mask_probability: float = key(0.0, "extra probability that a whole level is masked", low=0.0, high=1.0)
    loss_weight: float = key(1.0, "weight of this level's loss", low=0.0)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The transformer that turns tokens into hidden states."""

    name: str = key(
        "masked",
        "masked (EAR, Lite-Hybrid) | mar (encoder and decoder) | next_scale (VAR) | "
        "continuous_next_scale (ParScale-EAR) | dit (diffusion of the whole map)",
        choices=KINDS,
    )
    width: int = key(768, "channels of the residual stream", low=8)
    depth: int = key(24, "transformer blocks; those of the decoder in mar", low=1)
    encoder_depth: int = key(12, "mar: blocks of the encoder", low=1)
    heads: int = key(12, "attention heads", low=1)
    mlp_ratio: float = key(4.0, "hidden width of the MLP over the width", above=0.0)
    dropout: float = key(0.1, "dropout after attention and in the MLP", low=0.0, below=1.0)
    class_tokens: int = key(64, "copies of the class embedding in front of the sequence", low=1)
    drop_path: float = key(
        0.0, "next_scale: drop rate of the last block's branches, growing linearly", low=0.0, below=1.0
    )
    gate_init: float = key(1e-3, "next_scale: initial scale of the gates of attention and MLP", above=0.0)
    use_unit_attention: bool = key(True, "next_scale: unit-length queries and keys with a learned scale a head")
    use_shared_modulation: bool = key(False, "next_scale: one modulation for all blocks, with an offset a block")
    use_scan: bool = key(True, "run the blocks by lax.scan (compile time flat in depth)", affects_result=False)
    use_remat: bool = key(False, "recompute activations in the backward pass", affects_result=False)


@dataclasses.dataclass(frozen=True)
class EnergyHeadConfig:
    """The one-step head for continuous tokens."""

    width: int = key(1024, "width of the MLP", low=1)
    depth: int = key(6, "residual blocks", low=1)
    noise_channels: int = key(64, "uniform noise channels per token", low=1)
    noise_scale: float = key(
        1.0, "factor on the noise in [-1/2, 1/2) before its embedding; sqrt(12) = 3.464 is unit variance", above=0.0
    )
    samples: int = key(2, "draws per token in the loss (m)", low=2, high=64)
    alpha: float = key(1.0, "exponent of the distance", above=0.0, below=2.0)
    repeats: int = key(1, "independent groups of m draws per token and step", low=1, high=64)
    temperature_scales: str = key(
        "shift",
        "what tau_infer scales: the shift in each block (EAR), or the noise",
        choices=("shift", "noise"),
        affects_result=False,
        read_by=USES,
    )


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """The pyramid of continuous scales that a continuous_next_scale generator draws, one pass a scale."""

    scales: tuple[int, ...] = key(
        (), "sides of the scales in latent pixels, coarsest first; empty = 1, 2, 4 … the grid (from coarse ids on)"
    )
    first_scale: str = key(
        "continuous",
        "what is drawn first: the coarsest continuous scale, or the coarse ids of lite_hybrid in front of it",
        choices=("continuous", "coarse"),
    )
    targets: str = key(
        "absolute",
        "what a scale holds: the reduced latent, or what the scales before it left over",
        choices=("absolute", "residual"),
    )
    context_noise: float = key(
        0.5,
        "noise on the scales in view while training: each keeps w of itself, w from 1 - this to 1",
        low=0.0,
        high=1.0,
    )
    own_context_probability: float = key(
        0.0, "probability that a scale in view is the model's own draw while training", low=0.0, high=1.0
    )
    scale_weight_power: float = key(
        1.0,
        "a: each token weighs 1 / tokens of its scale ^ a; 1 = scales count alike, 0 = tokens do",
        low=0.0,
        high=2.0,
    )
    least_draws: int = key(
        0,
        "draws of the loss an image and scale, tokens times m, at least: scales of few tokens take a larger m",
        low=0,
        high=256,
    )
    head: str = key(
        "token",
        "how a scale is drawn: each token alone, or together with attention between them",
        choices=("token", "joint"),
    )
    windows: tuple[int, ...] = key((1, 2, 4), "joint: sides of the squares of tokens that the score judges; 0 = all")
    attention_heads: int = key(4, "joint: attention heads in the head", low=1)


@dataclasses.dataclass(frozen=True)
class AggregateConfig:
    """ParScale for continuous_next_scale: copies of the backbone's input, each behind a learned prefix, joined again.

    All of the backbone's work is done once for each copy.
    """

    streams: int = key(1, "copies; 1 = off", low=1, high=64)
    prefix_tokens: int = key(8, "learned keys and values in front of each copy, a layer (the paper: 48)", low=1)
    smoothing: float = key(0.1, "s: each copy weighs s / streams at least", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Gaussian diffusion: MAR's head for continuous tokens, or the process of a dit backbone."""

    width: int = key(1024, "head: width of the MLP", low=1)
    depth: int = key(6, "head: residual blocks", low=1)
    train_steps: int = key(1000, "steps of the trained process", low=2)
    schedule: str = key("cosine", "noise schedule", choices=("cosine", "linear"))
    sample_steps: int = key(
        100, "head: denoising steps a token, evenly respaced", low=1, affects_result=False, read_by=USES
    )
    repeats: int = key(4, "head: independent time steps a token and update", low=1, high=64)
    sampler: str = key(
        "ddpm",
        "dit: ancestral or deterministic steps",
        choices=("ddpm", "ddim"),
        affects_result=False,
        read_by=USES,
    )
    guided_channels: int = key(
        3,
        "dit: latent channels that guidance acts on, the first n; 0 = all",
        low=0,
        affects_result=False,
        read_by=USES,
    )


@dataclasses.dataclass(frozen=True)
class SoftmaxHeadConfig:
    """The head for discrete tokens."""

    label_smoothing: float = key(0.0, "label smoothing", low=0.0, below=1.0)


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Backbone, heads and what the generator learns at each level."""

    start_from: str = key("", "model folder or .safetensors that gives the first weights; empty = none")
    freeze: tuple[str, ...] = key(
        (), "what keeps the weights of start_from: trunk, embeddings, head, or names of arrays or what they begin with"
    )
    backbone: BackboneConfig = group(BackboneConfig)
    continuous_head: str = key("energy", "head of continuous levels", choices=("energy", "diffusion"))
    energy: EnergyHeadConfig = group(EnergyHeadConfig)
    pyramid: PyramidConfig = group(PyramidConfig)
    aggregate: AggregateConfig = group(AggregateConfig)
    diffusion: DiffusionConfig = group(DiffusionConfig)
    softmax: SoftmaxHeadConfig = group(SoftmaxHeadConfig)
    patch_size: int = key(1, "side of the squares of latent pixels that make one fine token", low=1, high=16)
    label_drop: float = key(0.1, "probability that a training image loses its label", low=0.0, high=1.0)
    spread_limits: tuple[float, ...] = key(
        (0.8, 1.25),
        "energy heads: ratio of the distance between draws to that of a draw to its target, outside which training "
        "warns; 1 is calibrated; empty = never",
        low=0.0,
        affects_result=False,
    )
    coarse: LevelConfig = dataclasses.field(
        default_factory=lambda: LevelConfig(steps=8, mask_ratio="cosine", mask_ratio_low=0.0)
    )
    fine: LevelConfig = group(LevelConfig)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """One training stage. Lengths are in epochs or in steps: the one that is not 0 counts."""

    batch_size: int = key(2048, "images per update, over all devices and accumulation steps", low=1)
    accumulation_steps: int = key(1, "micro-batches an update is split into", low=1)
    epochs: float = key(0.0, "length of the run in passes over the data", low=0.0)
    steps: int = key(0, "length of the run in updates", low=0)
    longer: str = key(
        "exact",
        "training longer than at first: only where it equals the longer run, or stretch the schedule from here on",
        choices=("exact", "stretch"),
        affects_result=False,
    )
    learning_rate: float = key(1e-4, "base learning rate", above=0.0)
    reference_batch_size: int = key(
        0, "batch size the learning rate is quoted for (linear scaling); 0 = no scaling", low=0
    )
    warmup_epochs: float = key(0.0, "linear warm-up, in epochs", low=0.0)
    warmup_steps: int = key(0, "linear warm-up, in updates", low=0)
    warmup_start_ratio: float = key(0.0, "learning rate at the first update over the peak", low=0.0, high=1.0)
    schedule: str = key("constant", "learning rate after warm-up", choices=("constant", "cosine", "linear"))
    hold_fraction: float = key(0.0, "linear: part of the run after warm-up that stays at the peak", low=0.0, below=1.0)
    final_learning_rate_ratio: float = key(0.0, "end of the cosine or line over the peak", low=0.0, high=1.0)
    beta1: float = key(0.9, "Adam's first decay", low=0.0, below=1.0)
    beta2: float = key(0.95, "Adam's second decay", low=0.0, below=1.0)
    weight_decay: float = key(0.02, "decoupled weight decay of matrices", low=0.0)
    final_weight_decay: float = key(-1.0, "weight decay at the end, reached on a cosine; -1 = no change", low=-1.0)
    clip_norm: float = key(3.0, "global gradient norm limit; 0 = none", low=0.0)
    head_learning_rate_multiplier: float = key(1.0, "learning rate of the head's matrices over the rest", above=0.0)
    final_phase_epochs: float = key(0.0, "length of the last phase, in epochs", low=0.0)
    final_phase_steps: int = key(0, "length of the last phase, in updates", low=0)
    final_phase_learning_rate_multiplier: float = key(1.0, "learning rate of the last phase over the first", above=0.0)
    train_temperature: float = key(1.0, "weight of the repulsion term of the energy score (tau_train)", above=0.0)
    final_phase_train_temperature: float = key(0.99, "tau_train of the last phase", above=0.0)
    ema_decay: float = key(0.9999, "decay of the averaged weights", low=0.0, below=1.0)
    compute_dtype: str = key(
        "bfloat16", "dtype of matmuls; parameters stay float32", choices=("float32", "bfloat16"), read_by=USES
    )
    max_nonfinite_in_a_row: int = key(10, "skipped updates in a row that stop the run", low=1, affects_result=False)
    log_every_steps: int = key(50, "steps between log lines", low=1, affects_result=False)
    grid_every_steps: int = key(0, "steps between picture grids; 0 = only at the end", low=0, affects_result=False)
    validate_every_steps: int = key(
        500, "steps between losses of one batch of held-out images; 0 = never", low=0, affects_result=False
    )
    checkpoint_every_steps: int = key(1000, "steps between checkpoints", low=1, affects_result=False)
    keep_checkpoints: int = key(2, "checkpoints kept", low=1, affects_result=False)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What --task=sample draws."""

    labels: tuple[int | str, ...] = key(
        (), "class ids or names (star,ring); empty = every class in turn", read_by=("sample",)
    )
    count: int = key(64, "images to draw; labels are repeated in order", low=1, read_by=("sample",))
    seed: int = key(0, "sample i depends on (seed, i) only", low=0, read_by=("sample", "evaluate"))
    batch_size: int = key(64, "images drawn at a time", low=1, read_by=("sample", "evaluate"))
    coarse_steps: int = key(0, "passes for the coarse level; 0 = as in generator.coarse.steps", low=0)
    fine_steps: int = key(0, "passes for the fine level; 0 = as in generator.fine.steps", low=0)
    guidance_scale: float = key(1.0, "1 = off; h = s * conditional + (1 - s) * unconditional", low=0.0)
    guidance_schedule: str = key("linear", "how guidance grows over a level's steps, or the scales", choices=SCHEDULES)
    guidance_interval: tuple[float, ...] = key(
        (0.0, 1.0), "schedule interval: first and last place of the guided steps or scales, from 0 to 1"
    )
    temperature: float = key(1.0, "tau_infer of the energy head; see generator.energy.temperature_scales", low=0.0)
    coarse_temperature: float = key(1.0, "softmax temperature of discrete levels", low=0.0)
    top_k: int = key(0, "scales of codes: draw among the k most likely; 0 = all", low=0)
    top_p: float = key(
        0.0, "scales of codes: draw among the most likely that hold this probability; 0 = all", low=0.0, high=1.0
    )
    density_draws: int = key(
        1, "energy head: draws of each token, or of a joint head's scale, that one is kept of; 1 = off", low=1, high=256
    )
    density_keep: float = key(
        1.0, "fraction of them, where draws are densest, that it is kept from; 1 = no preference", above=0.0, high=1.0
    )
    aggregate: int = key(0, "copies run of generator.aggregate.streams, the first n; 0 = all", low=0)
    format: str = key("png", "single files and a grid, or one .npz", choices=("png", "npz"), read_by=("sample",))


SAMPLE_METRICS = (
    "fd",
    "sfid",
    "inception_score",
    "kid",
    "precision_recall",
    "density_coverage",
    "class_accuracy",
    "diversity",
)
"""What can be measured of samples; each needs what its network and reference hold."""

LEAST_JUDGED_PX = 16
"""Side of the smallest images that the judging classifier takes."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What --task=evaluate measures, and on what."""

    images: str = key("", "folder of images or .npz (arr_0) to score instead of a model")
    features: str = key(
        "auto",
        "network of the Fréchet distance; auto = inception where inception_weights is given, else efficientnet_lite0 "
        "for photographs where its package is installed (extra `judge`), else inception of the cache, else classifier",
        choices=("auto", "classifier", "inception", "efficientnet_lite0"),
    )
    inception_weights: str = key("", "file with the Inception network of FID; empty = the cache, or download once")
    lpips_weights: str = key(
        "", "file with VGG16 and LPIPS; 'download' = the cache, or download; empty = no LPIPS", read_by=("evaluate",)
    )
    reference: str = key("", "statistics of the real images (.npz); empty = made from the data as config.stats says")
    metrics: str = key("all", f"what is measured of samples, with commas between: {', '.join(SAMPLE_METRICS)}, or all")
    samples: int = key(1_000, "images drawn", low=1, read_by=("evaluate",))
    reconstructions: int = key(1_000, "held-out images reconstructed", low=1, read_by=("evaluate",))
    batch_size: int = key(128, "images that the feature network sees at a time", low=1)
    knn_samples: int = key(10_000, "features kept for what compares neighbours or pairs", low=2)
    every_steps: int = key(
        0, "steps between scores while the generator trains; 0 = none", low=0, read_by=(), is_asked=False
    )
    every_samples: int = key(500, "images drawn for each of those scores", low=2, read_by=(), is_asked=False)
    classifier_steps: int = key(400, "updates of the judging classifier", low=1)
    classifier_batch_size: int = key(128, "batch size of the judging classifier", low=1)
    classifier_channels: int = key(16, "base channels of the judging classifier", low=1)


@dataclasses.dataclass(frozen=True)
class StatsConfig:
    """The reference that samples are compared with: what --task=stats writes, or evaluate makes where none is given."""

    split: str = key("train", "images the statistics are of", choices=("train", "eval"))
    images: int = key(0, "number of images, drawn from all of the split; 0 = all", low=0)
    name: str = key("", "the file is WORKDIR/stats_<name>.npz; empty = source, size and split", read_by=())


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """The cache of tokens that the generator trains on."""

    batch_size: int = key(256, "images encoded at a time", low=1, affects_result=False)
    dtype: str = key("float16", "stored dtype of continuous tokens", choices=("float16", "float32"))
    source: str = key("", "latents:PATH reads an existing cache; empty = WORKDIR/latents")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a process runs, whatever its task."""

    program_cache: str = key(
        "auto", "folder that keeps compiled programs for the next start: auto = in the user's cache folder | off | PATH"
    )
    wandb_project: str = key(
        "",
        "also log to this project of Weights & Biases (needs the wandb extra); empty = no",
        read_by=("evaluate", IMAGES),
    )
    profile_steps: tuple[int, ...] = key(
        (), "first and last step of a profiler trace in STAGE/profile; empty = none", read_by=()
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 takes all that are left."""

    data: int = key(-1, "data-parallel devices", low=-1)
    fsdp: int = key(1, "devices that share each parameter", low=-1)
    tensor: int = key(1, "tensor-parallel devices", low=-1)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What --task=bench times."""

    what: str = key(
        "stages", "a model's stages, or the compilation of a recipe's programs", choices=("stages", "compile")
    )
    batch_size: int = key(4, "images per call", low=1)
    warmup_repeats: int = key(3, "untimed calls", low=1)
    repeats: int = key(20, "timed calls", low=3)


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What --task=convert reads and writes."""

    checkpoint: str = key(
        "", "file with the generator's weights, or the tokenizer's where that is all: .safetensors, .pth, .pt, .ckpt"
    )
    tokenizer: str = key("", "file with the tokenizer's weights, or a model folder that holds it")
    weights: str = key(
        "auto", "table inside the file, for example model_ema; raw = as trained; auto prefers averaged weights"
    )
    tokenizer_weights: str = key("auto", "the same inside the tokenizer's file, when a generator is converted with it")
    to: str = key(
        "ear_jax",
        "ear_jax writes a model folder; torch writes the family's own names and layouts",
        choices=("ear_jax", "torch"),
    )
    layout: str = key("reference", "names of a KL autoencoder's arrays", choices=("reference", "diffusers"))
    class_names: str = key("", "text file with one class name a line; empty = the numbers")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What --task=study compares; the files of configs/studies/ set it."""

    name: str = key("", "study", choices=("", "fidelity", "end_to_end", "ablation"))
    arms: tuple[str, ...] = key((), "arms to run; none named: all of the study")
    seeds: tuple[int, ...] = key((0, 1, 2), "seed of each repetition")
    samples: int = key(1_200, "images drawn for each setting", low=2)
    passes: tuple[int, ...] = key((1, 2, 4, 8, 16), "backbone passes that each level is swept over")


@dataclasses.dataclass(frozen=True)
class Config:
    """A recipe from data to evaluated images."""

    name: str = key("lite_hybrid", "name of the recipe, used in run folders and cards", read_by=(), is_asked=False)
    seed: int = key(0, "seed of everything random", low=0, read_by=("evaluate", IMAGES), is_asked=False)
    data: DataConfig = group(DataConfig, read_by=("evaluate", IMAGES), is_asked=False)
    tokenizer: TokenizerConfig = group(TokenizerConfig, read_by=(), is_asked=False)
    tokenizer_training: TrainingConfig = group(TrainingConfig, read_by=(), is_asked=False)
    latents: LatentsConfig = group(LatentsConfig, read_by=(), is_asked=False)
    generator: GeneratorConfig = group(GeneratorConfig, read_by=(), is_asked=False)
    generator_training: TrainingConfig = group(TrainingConfig, read_by=(), is_asked=False)
    sample: SampleConfig = group(SampleConfig, read_by=USES, is_asked=True)
    evaluate: EvaluateConfig = group(EvaluateConfig, read_by=("evaluate", IMAGES), is_asked=True)
    stats: StatsConfig = group(StatsConfig, read_by=("evaluate", IMAGES), is_asked=True)
    run: RunConfig = group(RunConfig, read_by=(*USES, IMAGES), is_asked=True)
    mesh: MeshConfig = group(MeshConfig, read_by=("evaluate", IMAGES), is_asked=False)
    bench: BenchConfig = group(BenchConfig, read_by=("bench",), is_asked=True)
    convert: ConvertConfig = group(ConvertConfig, read_by=(), is_asked=True)
    study: StudyConfig = group(StudyConfig, read_by=(), is_asked=True)
    once: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """No key: what was given for this call alone, by path, with the value that the run keeps."""
