"""Whether a tokenizer and tokens that a run takes from elsewhere are still those that it was made from.

Identity is content: the same model or cache under a new path is the same one, another one under the old path is not.
"""

from collections.abc import Callable
from pathlib import Path

from ear_jax.config.schema import Config
from ear_jax.data.latents import cache_digest
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import read_json, write_json
from ear_jax.folders import model_folder
from ear_jax.folders.workdir import COMPLETE, Workdir

_TOKENS = "tokens.json"


def known_tokenizer(config: Config, workdir: Workdir, say: Callable[[str], None]) -> str:
    """Return the `tokenizer.source` under which a run knows its tokenizer, and say so where it lies elsewhere now.

    Raises:
        ConfigError: the model at the recorded path has another tokenizer than the run took from there.
        DataError: a model folder is damaged.
    """
    given, own = config.tokenizer.source, workdir.model("tokenizer")
    known = (read_json(workdir.stage("tokenizer") / "made_from.json") or {}).get("tokenizer.source")
    if not (given and known and (own / "config.json").is_file()):
        return given
    try:
        found = model_folder.find(given)
    except ConfigError:
        return given  # the run has a copy of its own; another path is refused as another setting
    if model_folder.have_same_part("tokenizer", found, own):
        if given != known:
            say(f"tokenizer   {given} has the same one as {known}, which the run began with")
        return known
    if given != known:
        return given
    raise ConfigError(
        f"the tokenizer of config.tokenizer.source={given} is another one than {workdir.root} took from there: it was "
        "trained on or replaced. Expected the same one, since tokens and generator are of it. Go on with the run's own "
        f"copy, --config.tokenizer.source={own}; bring the old model back; or use another --workdir for the new one."
    )


def tokens_path(config: Config, workdir: Workdir) -> Path:
    """Return the folder of the tokens that a generator trains on."""
    own = config.latents.source
    return Path(own.removeprefix("latents:")).expanduser() if own else workdir.stage("latents")


def known_latents(config: Config, workdir: Workdir, say: Callable[[str], None]) -> str:
    """Return the `latents.source` under which a run knows its tokens, and say so where they lie elsewhere now."""
    given = config.latents.source
    begun = read_json(workdir.stage("generator") / "made_from.json")
    trained_on = _trained_on(workdir)
    if begun is None or not trained_on or (known := begun.get("latents.source", "")) == given:
        return given
    path = tokens_path(config, workdir)
    try:
        is_same = cache_digest(path) == trained_on
    except DataError:
        return given  # refused as another setting
    if is_same:
        say(
            f"latents     {path} holds the same tokens as {known or workdir.stage('latents')}, which the run began with"
        )
    return known if is_same else given


def record_tokens(workdir: Workdir, digest: str) -> None:
    """Keep the digest of the tokens that a generator is trained on."""
    write_json(workdir.stage("generator") / _TOKENS, {"digest": digest})


def check_tokens(config: Config, workdir: Workdir) -> None:
    """Refuse tokens that are not those that a generator was begun with: encoded from other images, or by another model.

    Raises:
        ConfigError: they are others.
        DataError: they are damaged.
    """
    path, trained_on = tokens_path(config, workdir), _trained_on(workdir)
    if trained_on and (path / "index.json").is_file() and cache_digest(path) != trained_on:
        raise ConfigError(
            f"{workdir.stage('generator')} was trained on other tokens than {path} holds now: images or "
            "tokenizer were changed after it. Expected the same ones. Use another --workdir, or delete "
            f"{workdir.stage('generator')} to train it on these."
        )


def _trained_on(workdir: Workdir) -> str | None:
    folder = workdir.stage("generator")
    begun, done = read_json(folder / _TOKENS) or {}, read_json(folder / COMPLETE) or {}
    return begun.get("digest") or done.get("data_digest")
