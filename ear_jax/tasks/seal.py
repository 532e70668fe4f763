"""Accept a model folder that was edited on purpose: its digest is taken anew, and what had changed is printed."""

from ear_jax.config.schema import Config
from ear_jax.folders import model_folder


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Seal `model`, or the model of the workdir; its configuration was checked as every configuration is."""
    place = model or workdir
    for line in model_folder.seal(place) or ["nothing had changed"]:
        print(f"seal        {line}", flush=True)
    print(f"seal        {model_folder.find(place)} is sealed as it is now", flush=True)
