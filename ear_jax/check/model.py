"""Checks of a model in use: its folder, its tokens, what its images depend on, and whether its times are possible."""

import itertools
from pathlib import Path

import numpy as np

from ear_jax.bench import plausibility
from ear_jax.bench.stages import LABEL_TO_IMAGE, Drawn, PipelineStages
from ear_jax.bench.timing import time_stages
from ear_jax.check.checklist import Outcome
from ear_jax.config import read
from ear_jax.folders import model_folder
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline
from ear_jax.types import Tokens

IMAGES = 8
MOST_LABELS = 4
REPEATS = 5


class ModelChecks:
    """The checks of one model; each returns what it saw and what is wrong."""

    def __init__(self, model: Pipeline, *, is_trained: bool = True) -> None:
        """Take the model's own way of sampling; the scale of tokens is looked at where the model is trained."""
        self.model, self.is_trained = model, is_trained
        self.stages = PipelineStages(model)
        classes = len(model.class_names)
        self.labels = np.unique(np.linspace(0, classes - 1, MOST_LABELS).astype(np.int32))
        self.mixed = np.resize(self.labels, IMAGES)

    def same_after_saving(self, folder: Path) -> Outcome:
        """Save the model, load it, save it again: arrays, files and samples must be the same bytes."""
        model, names = self.model, {"tokenizer": self.model.tokenizer_arrays, "generator": self.model.generator_arrays}
        tensors = {part: {n: np.asarray(a) for n, a in arrays.items()} for part, arrays in names.items() if arrays}
        first = model_folder.write(folder / "first", read.to_dict(model.config), tensors, model.class_names, {})
        loaded = pipeline.load(first)
        found = model_folder.read(first)
        faults = [
            f"{part}/{name} changed on its way through the file."
            for part, arrays in tensors.items()
            for name, array in arrays.items()
            if found.tensors[part][name].tobytes() != array.tobytes()
        ]
        if loaded.config != model.config:
            faults.append("the configuration changed on its way through the file.")
        second = model_folder.write(folder / "second", found.config_dict, found.tensors, found.class_names, {})
        files = sorted(path.name for path in first.glob("*.safetensors"))
        faults += [
            f"{name} is another file when it is saved again."
            for name in files
            if (first / name).read_bytes() != (second / name).read_bytes()
        ]
        size = sum((first / name).stat().st_size for name in files)
        if model.has_generator:
            if PipelineStages(loaded).sample(self.mixed).tobytes() != self.stages.sample(self.mixed).tobytes():
                faults.append("the loaded model draws other images from the same labels and seed.")
        return Outcome(f"{sum(map(len, tensors.values()))} arrays, {size / 2**20:.1f} MiB, samples", faults)

    def encodes(self, images: np.ndarray) -> Outcome:
        """Encode images: tokens in range, finite, and not the same for different images."""
        tokens = self.model.encode(images)
        faults = plausibility.token_faults(tokens.levels, self.model.spec)
        rows = np.concatenate([np.asarray(level, np.float32).reshape(len(images), -1) for level in tokens.levels], 1)
        faults += plausibility.identical_faults("images' tokens", rows)
        return Outcome(", ".join(self._described()), faults)

    def decodes(self, images: np.ndarray) -> Outcome:
        """Decode the tokens of images, all levels and the discrete ones alone."""
        tokens = self.model.encode(images)
        decoded = self.model.decode(tokens)
        faults = plausibility.constant_faults("decoded images", decoded)
        seen = f"{decoded.shape[1]} x {decoded.shape[2]} px"
        discrete = sum(level.ndim == 2 for level in tokens.levels)
        if 0 < discrete < len(tokens.levels):
            coarse = self.model.decode(Tokens(tokens.levels[:discrete]))
            faults += plausibility.unchanged_faults("fine tokens", {"with": decoded, "without": coarse}, tolerance=0)
            seen += ", and without fine tokens"
        return Outcome(seen, faults)

    def draws_tokens(self) -> Outcome:
        """Draw tokens level by level: in range, finite, and of a trained model of unit scale."""
        levels, spec = self._drawn().tokens.levels, self.model.spec
        faults = plausibility.token_faults(levels, spec)
        if self.is_trained and not faults:
            faults = plausibility.scale_faults(levels, spec)
        return Outcome(", ".join(self._described()), faults)

    def stages_make_the_whole(self) -> Outcome:
        """Compare the images of the stages one after the other with those of the one program that users call."""
        whole, parts = self.stages.sample(self.mixed), self._drawn().images
        faults = plausibility.constant_faults("samples", whole)
        gap = np.abs(whole.astype(int) - parts)
        # A token at a boundary may fall on its other side in another program; a few such images say nothing.
        other = int((gap > plausibility.ROUNDING_LEVELS).any((1, 2, 3)).sum())
        if other > len(whole) // 2:
            faults.append(
                f"{other} of {len(whole)} images of the stages one after the other are not those of label to image."
            )
        return Outcome(f"largest difference {gap.max()} of 255", faults)

    def depends_on_the_label(self) -> Outcome:
        """Draw the same indices and seed with other labels."""
        if len(self.labels) < 2:
            return Outcome("one class: there is nothing to depend on")
        images = {int(label): self.stages.sample(np.full(IMAGES, label)) for label in self.labels}
        change = _mean_change(list(images.values()))
        return Outcome(
            f"mean difference {change:.1f} of 255 between {len(images)} labels",
            plausibility.unchanged_faults("label", images),
        )

    def depends_on_the_noise(self) -> Outcome:
        """Draw with other seeds and indices, the whole and every level given the same earlier ones."""
        label = np.full(IMAGES, self.labels[0])
        streams = {seed: self.stages.sample(label, seed) for seed in (0, 1, 2)}
        faults = plausibility.unchanged_faults("noise (the seed)", streams)
        faults += plausibility.identical_faults("samples", np.concatenate(list(streams.values())))
        for name, levels in self.stages.levels_by_seed(label, (0, 1, 2)).items():
            faults += [
                f"{name}: {fault}"
                for fault in plausibility.unchanged_faults("noise, given the earlier levels", levels, tolerance=0)
            ]
        change = _mean_change(list(streams.values()))
        return Outcome(f"mean difference {change:.1f} of 255 between {len(streams)} seeds", faults)

    def repeats_itself(self) -> Outcome:
        """Draw twice with one seed, and with other neighbours: an image depends on seed, index and label alone."""
        first, second = self.stages.sample(self.mixed, 5), self.stages.sample(self.mixed, 5)
        faults = [] if first.tobytes() == second.tobytes() else ["the same seed gives other images."]
        others = np.roll(self.mixed, 1)
        others[0] = self.mixed[0]
        alone = self.stages.sample(others, 5)[0]
        if plausibility.largest_difference(first[0], alone) > plausibility.ROUNDING_LEVELS:
            faults.append("an image changes with the labels of its neighbours in the batch.")
        return Outcome(f"{len(first)} images, drawn twice and with other neighbours", faults)

    def takes_possible_times(self, peak_flops_per_s: float, peak_name: str) -> Outcome:
        """Time the stages: none faster than its roofline, and the whole not shorter than one of them."""
        stages = self.stages.of_generation(self.mixed)
        calls = {name: stage.call for name, stage in stages.items()} | {
            LABEL_TO_IMAGE: lambda: self.stages.sample(self.mixed)
        }
        timings = {timing.name: timing for timing in time_stages(calls, warmup_repeats=1, repeats=REPEATS)}
        flops = {name: stage.flops for name, stage in stages.items()}
        flops[LABEL_TO_IMAGE] = sum(flops.values())
        seconds = {name: timing.median_ms / 1e3 for name, timing in timings.items()}
        faults = plausibility.roofline_faults(seconds, flops, peak_flops_per_s)
        whole = timings.pop(LABEL_TO_IMAGE)
        faults += plausibility.whole_faults(
            {name: timing.p10_ms for name, timing in timings.items()}, whole.p90_ms, name=LABEL_TO_IMAGE
        )
        used = max(flops[name] / seconds[name] for name in flops) / peak_flops_per_s
        total = sum(timing.median_ms for timing in timings.values())
        return Outcome(
            f"stages {total:.1f} ms, whole {whole.median_ms:.1f} ms for {IMAGES} images; "
            f"at most {used:.1%} of {peak_name}",
            faults,
        )

    def _drawn(self) -> Drawn:
        return self.stages.draw(self.mixed)

    def _described(self) -> list[str]:
        return [f"{level.name} {level.tokens} x {level.size} {level.kind}" for level in self.model.spec.levels]


def _mean_change(images: list[np.ndarray]) -> float:
    """Return the mean absolute difference between neighbours in a list of image sets."""
    gaps = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(images)]
    return float(np.mean(gaps))
