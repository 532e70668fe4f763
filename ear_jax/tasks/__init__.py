"""Tasks: the verbs of the command line, imported only when they are asked for.

Each is a function `(config: Config, workdir: str, *, model: str | None) -> None`.
"""

TASKS = {
    "run": "ear_jax.tasks.run:run",
    "prepare": "ear_jax.tasks.prepare:run",
    "tokenizer": "ear_jax.tasks.stages:run_tokenizer",
    "latents": "ear_jax.tasks.stages:run_latents",
    "generator": "ear_jax.tasks.stages:run_generator",
    "sample": "ear_jax.tasks.stages:run_sample",
    "evaluate": "ear_jax.tasks.stages:run_evaluate",
    "show": "ear_jax.tasks.show:run",
    "bench": "ear_jax.tasks.bench:run",
    "study": "ear_jax.tasks.study:run",
    "convert": "ear_jax.tasks.convert:run",
    "stats": "ear_jax.tasks.stages:run_stats",
    "check": "ear_jax.tasks.check:run",
    "seal": "ear_jax.tasks.seal:run",
}
"""Name on the command line -> module:function."""

TRAINING = ("run", "prepare", "tokenizer", "latents", "generator", "convert", "study")
"""Those that make a run what it is; whatever is given to the others is of that call alone."""

MODEL_READERS = ("sample", "evaluate", "bench", "study", "check", "convert", "seal")
"""Those that use what `--model` names; to the others it can only bring a configuration."""

SUMMARIES = {
    "run": "all stages in order, each skipped when its result is complete (the default)",
    "prepare": "download and convert a tfds:NAME data set (needs the tf extra)",
    "tokenizer": "train the tokenizer",
    "latents": "encode the data into the cache the generator trains on",
    "generator": "train the generator",
    "sample": "draw images from a model folder or a run",
    "evaluate": "measure reconstructions and samples",
    "show": "print the resolved config, parameters, tokens, FLOPs and memory",
    "bench": "time each stage of sampling",
    "study": "compare arms with seeds: tables, plots, verdicts",
    "convert": "turn published weights into a model folder, or back",
    "stats": "compute reference statistics of a data set",
    "check": "run every part once for real and say what holds",
    "seal": "accept a model folder that was edited on purpose",
}
"""One line a task, for --help."""
