"""Files that a later stage reads, looked for before the first one trains."""

from pathlib import Path

from ear_jax import build
from ear_jax.errors import DataError
from ear_jax.folders import model_folder
from ear_jax.stages.session import Session
from ear_jax.stages.starting import comparable, starting_from
from ear_jax.training.freezing import group_of


def check_later_files(session: Session) -> None:
    """Refuse a recipe that names what is not there; the stages themselves say what else they refuse.

    Raises:
        ConfigError: the model that the generator starts from is missing or of another kind or size, or there is no
            such part to freeze.
        DataError: a file of the evaluation is.
    """
    settings, start = session.config.evaluate, session.config.generator.start_from
    files = {name: getattr(settings, name) for name in ("reference", "inception_weights", "lpips_weights")}
    for name, path in files.items():
        if path and (name, path) != ("lpips_weights", "download") and not Path(path).is_file():
            raise DataError(f"config.evaluate.{name}={path!r} is not a file. Correct the path, or leave it out.")
    # A generator that goes on does not read the other model again.
    if start and not session.has_begun("generator") and not Path(start).is_file():
        with starting_from("generator", start):
            comparable(session.config, model_folder.read_document(model_folder.find(start))["config"])
    if session.config.generator.freeze:
        spec = build.abstract_tokenizer(session.config).spec
        group_of(build.abstract_generator(session.config, spec, 1), session.config.generator.freeze)
