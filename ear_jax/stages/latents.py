"""Encode every training image and its mirror image once, into the cache that the generator trains on."""

import jax
import numpy as np

from ear_jax import build
from ear_jax.data.latents import CacheDescription, LatentsWriter, is_complete
from ear_jax.data.loader import eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import write_quarantine
from ear_jax.distributed.process import barrier
from ear_jax.files import digest_of
from ear_jax.folders import model_folder
from ear_jax.nn.functional import functional
from ear_jax.nn.resize import to_signed
from ear_jax.stages.session import Session
from ear_jax.training.progress import Progress

FLUSH_EVERY_BATCHES = 16


def cache_latents(session: Session) -> None:
    """Write `latents/`, or say which cache is used instead; continues an interrupted one."""
    config, workdir = session.config, session.workdir
    if config.latents.source:
        session.say(f"latents     read from {config.latents.source}")
        return
    session.begin_with_same_data()
    tensors = model_folder.read(workdir.model("tokenizer")).tensors["tokenizer"]
    source = open_split(config.data, "train", seed=config.seed)
    abstract = build.abstract_tokenizer(config)
    static, _, _ = functional(abstract)
    weights = digest_of(*(f"{name}:".encode() + tensors[name].tobytes() for name in sorted(tensors)))
    description = CacheDescription(
        images=len(source),
        levels=abstract.spec.levels,
        class_names=source.class_names,
        digest=digest_of(source.digest, weights),
        dtype=config.latents.dtype,
        shards=jax.process_count(),
    )
    if is_complete(workdir.stage("latents"), description):
        session.say(f"latents     complete in {workdir.stage('latents')}")
        return
    writer = LatentsWriter(workdir.stage("latents"), description, shard=jax.process_index())
    arrays = {name: jax.device_put(tensor) for name, tensor in tensors.items()}

    @jax.jit
    def encode(arrays: dict, images: jax.Array) -> tuple[dict, dict]:
        tokenizer = static.merge(arrays)
        floats = to_signed(images)
        return tokenizer.posterior(floats).to_batch(), tokenizer.posterior(floats[:, :, ::-1]).to_batch()

    size = min(config.latents.batch_size, len(source))
    batches = eval_batches(
        source,
        size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        decode_threads=config.data.decode_threads,
    )
    rows_done, total = 0, -(-description.rows(jax.process_index()) // size)
    with Progress("latents", total, images_per_step=size, enabled=session.is_first) as progress:
        for number, batch in enumerate(batches, start=1):
            valid = batch["index"] >= 0
            rows_done += int(valid.sum())
            if rows_done <= writer.next_row:
                continue
            posterior, mirrored = jax.device_get(encode(arrays, batch["image"]))
            keep = lambda values, valid=valid: {name: np.asarray(value)[valid] for name, value in values.items()}  # noqa: E731
            writer.write(keep(posterior), keep(mirrored), batch["label"][valid])
            if number % FLUSH_EVERY_BATCHES == 0:
                writer.flush()
            if number % max(1, total // 5) == 0:
                progress.update(number, {})
    writer.finish_shard()
    barrier("latents: all shards written")
    if session.is_first:
        writer.finish()
        if config.tokenizer.source:  # no tokenizer stage has read the images and reported the damaged ones
            write_quarantine(workdir.root / "quarantine.tsv", [source.quarantine])
    barrier("latents: finished")
    session.ledger.event("latents", images=len(source), digest=description.digest)
