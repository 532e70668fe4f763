"""Public files fetched once to a cache folder, each checked against a digest that stands in the source."""

import contextlib
import dataclasses
import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ear_jax.errors import DataError
from ear_jax.files import atomic_file, cache_folder, file_sha256

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class PublicFile:
    """A file that its publisher never changes: name, what it is, size, SHA-256, and where it lies, best place first."""

    name: str
    what: str
    size: int
    sha256: str
    urls: tuple[str, ...]


def fetch(file: PublicFile, *, setting: str) -> Path:
    """Return the file in the cache folder, downloading it if it is not there; what is there is checked every time.

    Args:
        file: What to fetch.
        setting: The key or argument by which a user passes a path instead, named in errors.

    Raises:
        DataError: no place gave the file; the message says where to get it and how to pass it.
        StorageError: the cache folder cannot be written.
    """
    path = cache_folder() / file.name
    if path.is_file():
        if file_sha256(path) == file.sha256:
            return path
        _LOG.warning("%s is damaged and is downloaded again", path)
    faults = []
    for url in file.urls:
        _LOG.info("downloading %s (%.0f MB) from %s to %s", file.what, file.size / 1e6, url, path.parent)
        try:
            with atomic_file(path) as temporary:
                _download(url, file, temporary)
            return path
        except _Failed as error:
            faults.append(f"{url}: {error}")
    raise DataError(
        f"{file.what} ({file.name}) could not be downloaded:\n  " + "\n  ".join(faults) + "\n"
        f"Get the file where there is a network, from {' or '.join(file.urls)}, and pass its path by {setting}, or put "
        f"it into {path.parent} (another folder: $EAR_JAX_CACHE)."
    )


class _Failed(Exception):
    """A place did not give the file; the next one may."""


def _download(url: str, file: PublicFile, path: Path) -> None:
    digest, received = hashlib.sha256(), 0
    with open(path, "wb") as target:
        for chunk in _chunks(url):
            received += len(chunk)
            if received > file.size:
                raise _Failed(f"more than the {file.size} bytes of the file arrived; this is something else")
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise _Failed(
            f"{received} bytes with SHA-256 {digest.hexdigest()} arrived, expected {file.size} with {file.sha256}"
        )


def _chunks(url: str) -> Iterator[bytes]:
    # Faults of the network only: those of the disk are the caller's, although both are OSError.
    with contextlib.ExitStack() as stack:
        try:
            response = stack.enter_context(urllib.request.urlopen(url, timeout=_TIMEOUT_S))
        except (OSError, ValueError) as error:
            raise _Failed(_reason(error)) from error
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Failed(f"the connection broke: {_reason(error)}") from error
            if not chunk:
                return
            yield chunk


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error)
