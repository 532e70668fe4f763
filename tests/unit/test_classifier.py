"""The judging classifier: it learns, sees through degradations, gives batch-independent answers, and is kept safely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ear_jax.metrics import classifier as classifiers
from ear_jax.metrics import classifier_training as training
from ear_jax.metrics.classifier import FILE_NAME, Classifier, accuracy, features, load_or_train, predict
from ear_jax.metrics.classifier_training import accuracy_when_degraded, train_classifier

PX = 16


def _pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three patterns (horizontal, vertical, checked) in random colours and phases."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 3
    y, x = np.mgrid[:PX, :PX]
    shift = rng.integers(0, 8, (count, 2, 1, 1))
    rows, columns = (y + shift[:, 0]) // 4 % 2, (x + shift[:, 1]) // 4 % 2
    pattern = np.select([labels[:, None, None] == k for k in range(3)], [rows, columns, rows ^ columns])
    dark, light = rng.integers(0, 90, (count, 1, 1, 3)), rng.integers(160, 256, (count, 1, 1, 3))
    return np.where(pattern[..., None] == 1, light, dark).astype(np.uint8), labels


def _batches():
    seed = 0
    while True:
        seed += 1
        image, label = _pictures(36, seed)
        yield {"image": image, "label": label}


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, list[str]]:
    lines: list[str] = []
    made = train_classifier(_batches(), 3, steps=70, channels=8, seed=0, image_px=PX, log=lines.append)
    return made, lines


def test_it_learns_and_sees_through_degradations(trained):
    classifier, lines = trained
    images, labels = _pictures(240, 999_999)
    report = accuracy_when_degraded(classifier, images, labels)
    assert set(report) == {"accuracy_clean", "accuracy_noise", "accuracy_blur", "accuracy_block_noise"}
    assert report["accuracy_clean"] > 0.97 and min(report.values()) > 0.85, report
    assert accuracy(classifier, images, (labels + 1) % 3) < 0.05
    assert lines and "70/70" in lines[-1]


def test_answers_depend_on_the_image_alone(trained):
    classifier, _ = trained
    images, _ = _pictures(classifiers._CHUNK + 5, 7)
    together, alone = features(classifier, images), features(classifier, images[-3:])
    assert together.shape == (classifiers._CHUNK + 5, 16)
    assert np.allclose(together[-3:], alone, atol=1e-5)
    floats = images.astype(np.float32) / 127.5 - 1
    assert (predict(classifier, floats) == predict(classifier, images)).all()


def test_the_same_seed_gives_the_same_weights():
    made = [train_classifier(_batches(), 3, steps=2, channels=8, seed=s, image_px=PX) for s in (1, 1, 2)]
    images, _ = _pictures(4, 5)
    first, again, other = (features(classifier, images) for classifier in made)
    assert (first == again).all() and not np.allclose(first, other)


@pytest.mark.parametrize(("image_px", "grid"), [(16, 4), (24, 3), (64, 4)])
def test_any_side_from_16_pixels(image_px, grid):
    images = jax.ShapeDtypeStruct((2, image_px, image_px, 3), jnp.float32)
    logits = jax.eval_shape(lambda x: Classifier(classes=5, channels=4, image_px=image_px)(x), images)
    assert logits.shape == (2, 5)
    stages = jax.eval_shape(lambda x: _last_grid(Classifier(classes=5, channels=4, image_px=image_px), x), images)
    assert stages.shape[1] == grid


def _last_grid(classifier: Classifier, x: jax.Array) -> jax.Array:
    x = classifier.stem(x)
    for block in classifier.blocks:
        x = block(x)
    return x


def test_too_small_images_and_missing_labels_are_refused(trained):
    with pytest.raises(ValueError, match="at least 16"):
        Classifier(classes=2, channels=8, image_px=15)
    with pytest.raises(ValueError, match="at least one"):
        accuracy(trained[0], np.zeros((0, PX, PX, 3), np.uint8), np.zeros((0,), np.int32))


@pytest.mark.parametrize("name", list(training.DEGRADATIONS))
def test_a_degradation_grows_with_its_amount_and_is_per_image(name):
    images = jnp.asarray(_pictures(3, 0)[0], jnp.float32) / 127.5 - 1
    changed = jax.jit(training.DEGRADATIONS[name])(images, jax.random.key(0), jnp.asarray([0.0, 0.3, 1.0]))
    error = np.asarray(jnp.mean((changed - images) ** 2, axis=(1, 2, 3)))
    assert error[0] == 0 and 0 < error[1] < error[2]


def test_block_noise_is_constant_within_its_squares_and_blur_keeps_flat_images():
    zeros = jnp.zeros((1, 16, 16, 3))
    squares = np.asarray(jax.jit(training.block_noise)(zeros, jax.random.key(0), jnp.ones(1))).reshape(8, 2, 8, 2, 3)
    assert (squares == squares[:, :1, :, :1]).all() and len(np.unique(squares)) == 8 * 8 * 3
    flat = jnp.full((1, 9, 7, 3), 0.3)
    assert np.allclose(jax.jit(training.blur)(flat, jax.random.key(0), jnp.ones(1)), 0.3, atol=1e-6)


def test_some_images_are_flipped_some_are_left_clean():
    images = jnp.asarray(_pictures(64, 3)[0], jnp.float32) / 127.5 - 1
    flipped = np.asarray(jax.jit(training.flip_some)(images, jax.random.key(0)))
    same = (flipped == np.asarray(images)).all((1, 2, 3))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all() and 16 < (~mirrored).sum() + (mirrored & same).sum() and not same.all()
    worse = np.asarray(jax.jit(training.degrade)(images, jax.random.key(0)))
    clean = (worse == np.asarray(images)).all((1, 2, 3)).mean()
    assert 0 < clean < 0.5 and np.abs(worse).max() <= 1


def test_a_kept_classifier_comes_back_and_anything_else_is_trained_again(tmp_path, trained):
    classifier, calls = trained[0], []

    def keep(**changes):
        def train():
            calls.append(changes)
            return classifier

        arguments = {"classes": 3, "channels": 8, "image_px": PX, "made_from": "digest-1 steps=100"} | changes
        return load_or_train(tmp_path, train=train, **arguments)

    images, _ = _pictures(10, 1)
    keep()
    kept = keep()
    assert len(calls) == 1 and kept is not classifier
    assert (features(kept, images) == features(classifier, images)).all()
    keep(made_from="digest-2 steps=100")
    assert len(calls) == 2
    path = tmp_path / FILE_NAME
    whole = bytearray(path.read_bytes())
    path.unlink()
    keep(made_from="digest-2 steps=100")
    assert path.read_bytes() == whole, "same run, same bytes, whatever the order of the header's texts"
    calls.pop()
    whole[-5] ^= 4
    path.write_bytes(whole)
    keep(made_from="digest-2 steps=100")
    assert len(calls) == 3
    path.write_bytes(whole[:100])
    keep(made_from="digest-2 steps=100")
    assert len(calls) == 4
