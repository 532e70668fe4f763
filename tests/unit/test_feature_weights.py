"""Weights of feature networks: every public form is read, downloads are checked, wrong files refused with advice."""

import dataclasses
import hashlib
import http.client
import socket
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from legacy_torch_file import CONTENT
from safetensors.numpy import save_file

from ear_jax.errors import DataError
from ear_jax.files import cache_folder, file_sha256
from ear_jax.metrics import feature_weights
from ear_jax.metrics.feature_weights import INCEPTION, inception_weights, lpips_weights, weights_digest
from ear_jax.metrics.inception import TAPS, Inception, checked_weights, inception_features, resize_tensorflow1
from ear_jax.nn.functional import functional
from ear_jax.weights import download
from ear_jax.weights.download import PublicFile, fetch
from ear_jax.weights.families import inception, lpips

BYTES = b"weights" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EAR_JAX_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    return tmp_path / "cache"


def _published(folder: Path, content: bytes = BYTES, *, also: tuple[str, ...] = ()) -> PublicFile:
    """A public file of BYTES at a file:// address where `content` lies; `also` are addresses to try first."""
    (folder / "there.bin").write_bytes(content)
    urls = (*also, (folder / "there.bin").as_uri())
    return PublicFile("small.bin", "a small network", len(BYTES), hashlib.sha256(BYTES).hexdigest(), urls)


def test_a_file_is_downloaded_once_and_checked_every_time(tmp_path: Path, cache: Path, caplog):
    file = _published(tmp_path)
    path = fetch(file, setting="config.x")
    assert path == cache / "small.bin"
    assert path.read_bytes() == BYTES
    (tmp_path / "there.bin").unlink()
    assert fetch(file, setting="config.x") == path, "no network needed any more"
    path.write_bytes(b"damaged")
    _published(tmp_path)
    assert fetch(file, setting="config.x").read_bytes() == BYTES
    assert "damaged and is downloaded again" in caplog.text
    assert list(cache.iterdir()) == [path], "nothing half written is left"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"<html>" + BYTES[6:], "with SHA-256"), (BYTES + b"!", "more than the 7000 bytes")]
)
def test_what_is_not_the_file_is_never_kept(tmp_path: Path, cache: Path, content: bytes, reason: str):
    with pytest.raises(DataError, match=reason):
        fetch(_published(tmp_path, content), setting="config.x")
    assert not list(cache.iterdir())


def test_the_next_place_is_tried_when_one_fails(tmp_path: Path):
    file = _published(tmp_path, also=((tmp_path / "absent").as_uri(), "no address"))
    assert fetch(file, setting="config.x").read_bytes() == BYTES


def test_without_a_network_the_error_says_where_to_get_the_file_and_how_to_pass_it(cache: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/small.bin"  # bound, not listening: refused at once
        file = PublicFile("small.bin", "a small network", 1, "0" * 64, (url,))
        with pytest.raises(DataError) as caught:
            fetch(file, setting="config.evaluate.inception_weights")
    message = str(caught.value)
    assert "refused" in message
    assert f"from {url}" in message
    assert "config.evaluate.inception_weights" in message
    assert str(cache) in message


def test_a_connection_that_breaks_is_a_fault_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, count: int) -> bytes:
            raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Broken())
    with pytest.raises(DataError, match="the connection broke"):
        fetch(_published(tmp_path), setting="config.x")


def test_published_digests_begin_as_the_file_names_say():
    for file in (INCEPTION, feature_weights.VGG16):
        digits = feature_weights._DIGITS_IN_NAME.search(file.name)
        assert digits is not None
        assert file.sha256.startswith(digits.group(1))
    for file in (INCEPTION, feature_weights.VGG16, feature_weights.LPIPS_LINEAR):
        assert len(file.sha256) == 64
        assert all(url.startswith("https://") for url in file.urls)


def _tiny_inception() -> dict[str, np.ndarray]:
    """Arrays under every published name with one element an axis: reading does not look at shapes."""
    names = [name for entry in inception.entries() for name in entry.theirs if entry.ours]
    axes = {name: 4 if name.endswith("conv.weight") else 2 if name == "fc.weight" else 1 for name in names}
    return {name: np.full((1,) * axes[name], index, np.float32) for index, name in enumerate(names)}


def test_inception_is_read_from_safetensors_with_and_without_training_counters(tmp_path: Path):
    arrays = _tiny_inception()
    save_file(arrays, tmp_path / "a.safetensors")
    counters = {f"{block}.bn.num_batches_tracked": np.zeros((), np.int64) for block in ("Conv2d_1a_3x3", "Mixed_6a.x")}
    save_file(arrays | counters, tmp_path / "b.safetensors")
    first, second = (inception_weights(str(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert first.digest == second.digest != weights_digest({**first.arrays, "class_bias": np.ones(1, np.float32)})
    assert first.files == {"a.safetensors": file_sha256(tmp_path / "a.safetensors")}
    assert first.arrays["mixed_7b/chains/1/1/prongs/1/kernel"] == arrays["Mixed_7b.branch3x3_2b.conv.weight"]


def test_entries_cover_the_network_and_undo_themselves():
    shapes = functional(nnx.eval_shape(Inception))[1]
    entries = inception.entries()
    assert sorted(name for entry in entries for name in entry.ours) == sorted(shapes)
    rng = np.random.default_rng(0)
    for entry in entries:
        if not entry.ours:
            assert entry.is_optional
            continue
        ours = [rng.random([2 + axis for axis in range(len(shapes[name].shape))]) for name in entry.ours]
        for before, after in zip(ours, entry.to_ours(entry.to_theirs(ours)), strict=True):
            np.testing.assert_array_equal(before, after)


def test_wrong_inception_files_are_refused_with_advice(tmp_path: Path):
    with pytest.raises(DataError, match=r"config\.x='[^']*absent\.pth' is not a file.*github\.com"):
        inception_weights(str(tmp_path / "absent.pth"), setting="config.x")
    arrays = _tiny_inception()
    del arrays["Mixed_6b.branch_pool.bn.bias"]
    save_file(arrays, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"lacks 'Mixed_6b\.branch_pool\.bn\.bias'; expected the Inception network"):
        inception_weights(str(tmp_path / "part.safetensors"))
    damaged = tmp_path / INCEPTION.name
    damaged.write_bytes(CONTENT)
    with pytest.raises(DataError, match="its name promises a SHA-256 beginning with 6726825d"):
        inception_weights(str(damaged))
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.pth"):
        inception_weights(str(tmp_path / "page.pth"))


def test_another_network_and_damaged_weights_are_refused():
    shapes = functional(nnx.eval_shape(Inception))[1]
    arrays = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    with pytest.raises(DataError, match=r"class_kernel has shape \(2048, 1000\), expected shape \(2048, 1008\)"):
        checked_weights({**arrays, "class_kernel": np.zeros((2048, 1000), np.float32)})
    with pytest.raises(DataError, match="mixed_5b/chains/0/0/kernel is missing"):
        checked_weights({n: a for n, a in arrays.items() if n != "mixed_5b/chains/0/0/kernel"})
    with pytest.raises(DataError, match="conv_1a/bias has values that are not finite"):
        checked_weights({**arrays, "conv_1a/bias": np.full(32, np.nan, np.float32)})
    with pytest.raises(ValueError, match=f"no tap 'pool_3'; it has {', '.join(TAPS)}"):
        inception_features(arrays, np.zeros((1, 8, 8, 3), np.uint8), ("pool_3",))


def test_lpips_is_read_from_one_file_and_from_the_two_public_ones(tmp_path: Path):
    names = [entry.ours[0] for entry in lpips.entries(())]
    (tmp_path / "vgg.pth").write_bytes(CONTENT)
    linear = {f"lin{i}.model.1.weight": np.array([i + 0.5, -i], np.float32).reshape(1, 2, 1, 1) for i in range(5)}
    whole = {name: np.full((1,), index, np.float32) for index, name in enumerate(names)} | linear
    save_file(whole, tmp_path / "whole.safetensors")
    as_torchvision = {
        entry.theirs[0]: whole[entry.ours[0]]
        for entry in lpips.entries(["features.0.weight"])
        if entry.ours[0] not in linear
    }
    assert {name.partition(".")[0] for name in as_torchvision} == {"features"}
    classifier = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    save_file(as_torchvision | classifier, tmp_path / "vgg16.safetensors")

    one = lpips_weights(str(tmp_path / "whole.safetensors"))
    two = lpips_weights(str(tmp_path / "vgg16.safetensors"), str(tmp_path / "vgg.pth"))
    assert one.arrays.keys() == two.arrays.keys() == set(names)
    assert one.digest == two.digest
    assert set(two.files) == {"vgg16.safetensors", "vgg.pth"}


def test_lpips_falls_back_on_the_cache_for_the_linear_layers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    small = dataclasses.replace(
        feature_weights.LPIPS_LINEAR, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(), urls=()
    )
    monkeypatch.setattr(feature_weights, "LPIPS_LINEAR", small)
    cache.mkdir()
    (cache / small.name).write_bytes(CONTENT)
    arrays = {
        entry.theirs[0]: np.zeros(1, np.float32)
        for entry in lpips.entries(["features.0.weight"])
        if entry.theirs[0].startswith("features")
    }
    save_file(arrays, tmp_path / "vgg16.safetensors")
    assert small.name in lpips_weights(str(tmp_path / "vgg16.safetensors")).files


def test_resize_takes_the_published_positions():
    resize = jax.jit(resize_tensorflow1, static_argnums=1)
    row = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1) * 10
    # Positions 0, 2/3, 4/3, 2, 8/3, 10/3: no half-pixel shift, and the last one repeats the edge.
    np.testing.assert_allclose(resize(row, 6)[0, 0, :, 0], [0, 20 / 3, 40 / 3, 20, 80 / 3, 30], rtol=1e-6)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(images, 5), images.astype(np.float32))
    shrunk = resize(np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1), 2)
    assert shrunk[0, :, 0, 0].tolist() == [0.0, 4.0], "no antialiasing"


def test_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("EAR_JAX_CACHE")
    monkeypatch.setattr(download.Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "ear_jax"
