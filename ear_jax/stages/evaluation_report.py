"""What an evaluation says on the terminal, and what it writes down about its judge."""

from collections.abc import Mapping
from typing import Any

from ear_jax.config.schema import Config
from ear_jax.metrics.features import CLASSIFIER_NAME
from ear_jax.stages.session import Session

_BESIDE = ("_std", "_low", "_high", "_floor")
_DETAILS = ("copies", "energy_score_gap", "relative_energy_gap", "class_accuracy")


def report(session: Session, result: Mapping[str, Any]) -> None:
    """Print the numbers of an evaluation, then its warnings, then signs of collapse."""
    for name, value in result.get("psnr_db", {}).items():
        session.say(f"evaluation  PSNR {name} {value:.2f} dB (held out)")
    if "classifier" in result:
        judged = (f"{name.removeprefix('accuracy_')} {value:.1%}" for name, value in result["classifier"].items())
        session.say(f"evaluation  judge on held-out images: {', '.join(judged)}")
        reconstructions, samples = result["class_accuracy_reconstructions"], result["class_accuracy_samples"]
        session.say(f"evaluation  class accuracy: reconstructions {reconstructions:.1%}, samples {samples:.1%}")
        network = result["protocol"]["scores"].get("features", {}).get("network", CLASSIFIER_NAME)
        if network != CLASSIFIER_NAME and "class_accuracy" in result["scores"]:
            right = result["reconstruction_scores"]["full"]["class_accuracy"], result["scores"]["class_accuracy"]
            session.say(f"evaluation  {network}: reconstructions {right[0]:.1%}, samples {right[1]:.1%} right")
    elif "class_accuracy" in result["scores"]:
        session.say(f"evaluation  class accuracy: images {result['scores']['class_accuracy']:.1%}")
    for what, values in result.get("reconstruction_scores", {}).items():
        _line(session, f"reconstructions from {'all' if what == 'full' else what} tokens", values)
    _line(session, "streams of the continuous head", result.get("streams", {}))
    _line(session, "samples" if "classifier" in result else "images", result["scores"])
    # Caveats of reconstructions are mostly those of samples again.
    shown = [warning for warning in result["warnings"] if not warning.startswith("reconstructions")]
    for warning in shown:
        session.say(f"warning     {warning}")
    if len(result["warnings"]) > len(shown):
        session.say(
            f"warning     {len(result['warnings']) - len(shown)} more, of reconstructions, are in the result file"
        )
    for alarm in result["collapse"]:
        session.say(f"COLLAPSE    {alarm}")


def judge_protocol(config: Config) -> str:
    """Return how the judging classifier was made, in words."""
    settings = config.evaluate
    return (
        f"residual classifier, {settings.classifier_steps} updates of {settings.classifier_batch_size} images, "
        f"{settings.classifier_channels} channels, on {config.data.source}, seed {config.seed}"
    )


def in_words(values: Mapping[str, float]) -> str:
    """Return scores on one line, each with its spread and its floor behind it; details stay in the result file."""
    parts = []
    for name, value in values.items():
        if name.endswith(_BESIDE) or name in _DETAILS:
            continue
        text = f"{name} {value:.4g}"
        if f"{name}_std" in values:
            text += f" ± {values[f'{name}_std']:.2g}"
        if f"{name}_floor" in values:
            text += f" (as many real images: {values[f'{name}_floor']:.3g})"
        parts.append(text)
    return ", ".join(parts)


def _line(session: Session, what: str, values: Mapping[str, float]) -> None:
    if shown := in_words(values):
        session.say(f"evaluation  {what}: {shown}")
