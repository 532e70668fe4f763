"""Open a folder of 1.28 million images as training does: seconds and memory, without an index and with one. Not in CI.

    python tests/million_files.py /tmp/million        # makes hard links there, measures, deletes them

Wanted: under 60 s cold, under 5 s from the index, under 1 GiB.
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
import sys, time
from ear_jax.config.schema import DataConfig
from ear_jax.data.open import open_split
config = DataConfig(source=f"folder:{sys.argv[1]}")
started = time.monotonic()
source = open_split(config, "train", seed=0)
print(f"{len(source)} images of {len(source.class_names)} classes in {time.monotonic() - started:.1f} s", flush=True)
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
            subprocess.run([sys.executable, "-c", OPEN, str(top / "photos")], check=True, env=environment)
            peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(f"at most {peak_kib / 1024:.0f} MiB of memory so far", flush=True)
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
