"""Open 1.28 million images as a run does: seconds and memory, without an index and with one. Not in CI.

    python tests/million_files.py /tmp/million        # makes hard links there, measures, deletes them

A run lists the images, compares the list with the one that it has kept (or keeps it), and opens them. Wanted: under
60 s cold, under 5 s from the index, under 1 GiB.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

CLASSES, IMAGES = 1_000, 1_280
OPEN = """
import pathlib, sys, time
from ear_jax.config.schema import DataConfig
from ear_jax.data import listing
from ear_jax.data.open import open_split
config, kept = DataConfig(source=f"folder:{sys.argv[1]}"), pathlib.Path(sys.argv[2])
began = [time.monotonic(), time.process_time()]
def told(what):
    seconds, processor = time.monotonic() - began[0], time.process_time() - began[1]
    print(f"{what} after {seconds:.1f} s ({processor:.1f} s of processor)", flush=True)
found = listing.listing_of(config)
told(f"{len(found)} files listed")
if before := listing.load(kept):
    assert before[1].has_files_of(found) and listing.differing(before[1], found, config) == ([], False)
    told("compared")
else:
    listing.save(kept, config.source, listing.with_contents(found, config))
    told("kept")
source = open_split(config, "train", seed=0)
told(f"{len(source)} training images of {len(source.class_names)} classes open")
told(f"{len(open_split(config, 'eval', seed=0))} evaluation images open")
print("\\n".join(source.notes))
"""


def main(top: Path) -> None:
    """Make the folder, open it twice in processes of their own, print what each took, and delete it."""
    top.mkdir(parents=True)
    environment = {**os.environ, "EAR_JAX_CACHE": str(top / "cache")}
    try:
        for label in range(CLASSES):
            folder = top / "photos" / f"n{label:08d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (label % 256, 0, 0)).save(folder / "000000.png")
            for number in range(1, IMAGES):
                os.link(folder / "000000.png", folder / f"{number:06d}.png")
        time.sleep(3)
        for what in ("without an index", "from the index"):
            print(what)
            arguments = [str(top / "photos"), str(top / "data.npz")]
            subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True, env=environment)
            peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(f"at most {peak_kib / 1024:.0f} MiB of memory so far", flush=True)
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
