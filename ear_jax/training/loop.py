"""The loop of a training stage: resume, compile, step, watch, save. It knows no model and no loss."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ear_jax.checkpoint.store import CheckpointStore
from ear_jax.config.schema import TrainingConfig
from ear_jax.data.loader import Loader
from ear_jax.distributed.mesh import check_batch_size, put_batch, replicated
from ear_jax.distributed.stop_signal import StopSignal
from ear_jax.distributed.watchdog import Watchdog
from ear_jax.errors import NonFiniteError, PreemptedError
from ear_jax.nn.flops import count_equations
from ear_jax.nn.functional import Arrays, Functional
from ear_jax.training.ledger import Ledger, TensorBoard, batch_digest
from ear_jax.training.optim import Recipe, make_optimizer
from ear_jax.training.progress import Progress
from ear_jax.training.report import loader_images_per_s, parameter_counts, peak_flops_per_s, start_report
from ear_jax.training.step import ModuleFactory, StatePlan, TrainState, make_train_step, make_validation, plan_state
from ear_jax.types import Group, usual_group

GridHook = Callable[[int, TrainState], dict[str, np.ndarray]]
"""(step, state) -> pictures by name, uint8 [h, w, 3]; saving them is the hook's business, TensorBoard is the loop's."""

RemarkHook = Callable[[int, Mapping[str, float]], Iterable[str]]
"""(step, its numbers by name) -> what is to be said of them, as whole sentences."""

ScoreHook = Callable[[int, TrainState], dict[str, float]]
"""(step, state) -> numbers by name; it must leave the state as it is. The loop writes them down."""

LONG_SECTION_S = 3600.0
"""Compiling, saving or drawing may take this long before the watchdog ends the process."""


@dataclasses.dataclass
class StageRun:
    """Everything the loop needs to run one stage.

    `shown` names the metrics printed at every log interval, in order. `initial` holds arrays by name that a run without
    a checkpoint starts with; their masked entries begin as they would alone. `held_out` makes a batch as the loader's,
    of images that are not trained on; `tracker` is a run of Weights & Biases, or None.
    """

    stage: str
    config_name: str
    config_dict: dict[str, Any]
    settings: TrainingConfig
    recipe: Recipe
    create: ModuleFactory
    loader: Loader
    mesh: Mesh
    seed: int
    folder: Path
    ledger: Ledger
    tensorboard_folder: Path
    shown: tuple[str, ...] = ("loss",)
    group: Callable[[str], Group] = usual_group
    overwrite: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]] | None = None
    initial: Mapping[str, np.ndarray] | None = None
    grid: GridHook | None = None
    score: ScoreHook | None = None
    score_every_steps: int = 0
    remark: RemarkHook | None = None
    held_out: Callable[[], dict[str, np.ndarray]] | None = None
    profile_steps: tuple[int, ...] = ()
    tracker: Any = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def times(self) -> dict[str, float]:
        """The measured times and rates among the facts."""
        return {name: value for name, value in self.facts.items() if isinstance(value, float)}


def train(run: StageRun) -> tuple[Functional, TrainState]:
    """Train until the last step, from the newest good checkpoint where there is one.

    Returns the static half of the module and the final state; `run.facts` gains the measured times.

    Raises:
        PreemptedError: asked to stop; the state has been saved.
        NonFiniteError: too many updates in a row were not finite; the last checkpoint is intact.
        ConfigError, DataError, StorageError: see their messages.
    """
    check_batch_size(run.settings.batch_size, run.mesh, accumulation_steps=run.settings.accumulation_steps)
    optimizer = make_optimizer(run.recipe, run.group)
    plan = plan_state(run.create, optimizer, run.mesh, seed=run.seed, overwrite=run.overwrite, group=run.group)
    total, is_first = run.recipe.lengths.total_steps, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        store = stack.enter_context(CheckpointStore(run.folder / "checkpoints", keep=run.settings.keep_checkpoints))
        state, start, resume = _start_state(run, plan, store)
        if start >= total:
            return plan.static, state
        frozen = {name: leaf for name, leaf in plan.shapes["rest"].items() if run.group(name).is_frozen}
        rate = loader_images_per_s(run.loader)
        report = start_report(
            config_name=f"{run.config_name} / {run.stage}",
            workdir=run.folder,
            parameters=parameter_counts({**plan.shapes["params"], **frozen}),
            frozen=sum(parameter_counts(frozen).values()),
            resume=resume,
            loader_images_per_s=rate,
            enabled=is_first,
        )
        run.ledger.event("start", stage=run.stage, **report)
        run.facts["loader_images_per_s"] = rate
        began = time.monotonic()
        batch = next(run.loader)
        tensorboard = stack.enter_context(
            TensorBoard(run.tensorboard_folder, start_step=start, enabled=is_first, tracker=run.tracker)
        )
        tensorboard.text(start, f"{run.stage}/config", json.dumps(run.config_dict, indent=1))
        validate = _Validation(run, plan) if run.held_out is not None else None
        profile = stack.enter_context(_Profile(run.folder / "profile", run.profile_steps, start, total, run.stage))
        peak = peak_flops_per_s(jax.devices()[0].device_kind) if run.settings.compute_dtype == "bfloat16" else None
        progress = stack.enter_context(
            Progress(
                run.stage,
                total,
                start_step=start,
                images_per_step=run.settings.batch_size,
                peak_flops_per_s=None if peak is None else peak * jax.device_count(),
                enabled=is_first,
            )
        )
        watchdog = stack.enter_context(Watchdog())
        with watchdog.section("compiling the training step", LONG_SECTION_S):
            placed = put_batch(batch, run.mesh)
            step_function, progress.flops_per_step = _compile(run, plan, optimizer, placed, progress)
        watch = _Watch(run, progress, tensorboard)
        root = jax.random.key(run.seed)
        for step in range(start + 1, total + 1):
            watchdog.beat()
            with profile.step(step):
                state, metrics = step_function(state, put_batch(batch, run.mesh), root)
            profile.done(step, metrics)
            watch.dispatched(step, metrics, np.asarray(batch["index"]))
            if step % run.settings.log_every_steps == 0:
                store.poll()
            if step == start + 1:
                jax.block_until_ready(metrics)
                progress.first_step_done(step)
                run.facts["time_to_first_step_s"] = time.monotonic() - began
            is_last, is_stopping = step == total, stop.requested(step)
            if is_last or is_stopping or step % run.settings.checkpoint_every_steps == 0:
                with progress.paused(), watchdog.section("saving", LONG_SECTION_S):
                    watch.drain()
                    _save(run, store, step, state, wait=is_last or is_stopping)
            if is_stopping:
                run.ledger.event("stop", stage=run.stage, step=step, signal=stop.name)
                raise PreemptedError(
                    f"{stop.name}: the state after step {step} of {total} is saved in {run.folder}. "
                    "Run the same command again to go on from there."
                )
            if validate is not None and _is_due(step, run.settings.validate_every_steps):
                with progress.paused(), watchdog.section("validating", LONG_SECTION_S):
                    watch.drain()
                    values = validate(state)
                    tensorboard.scalars(step, values, prefix=f"{run.stage}/validation")
                    run.ledger.event("validation", stage=run.stage, step=step, **values)
            is_scored = run.score is not None and _is_due(step, run.score_every_steps)
            if run.grid is not None and (is_last or is_scored or _is_due(step, run.settings.grid_every_steps)):
                with progress.paused(), watchdog.section("drawing a grid", LONG_SECTION_S):
                    watch.drain()
                    for name, picture in run.grid(step, state).items():
                        tensorboard.picture(step, f"{run.stage}/{name}", picture)
            if run.score is not None and is_scored:
                with progress.paused(), watchdog.section("scoring samples", LONG_SECTION_S):
                    watch.drain()
                    scores = run.score(step, state)
                    tensorboard.scalars(step, scores, prefix=f"{run.stage}/scores")
                    run.ledger.event("scores", stage=run.stage, step=step, **scores)
            if not is_last:
                batch = next(run.loader)
        run.facts["train_s"] = time.monotonic() - began
        run.facts["last_metrics"] = watch.last
    return plan.static, state


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _start_state(run: StageRun, plan: StatePlan, store: CheckpointStore) -> tuple[TrainState, int, str]:
    restored = store.restore_latest(plan.like)
    if restored is None:
        for note in store.notes:
            print(f"[{run.stage}] {note}", flush=True)
        # A run that ended before its first checkpoint, or whose folder was deleted, left updates that no longer count.
        run.ledger.resume(run.stage, 0)
        return _started_from(plan, run.initial or {}), 0, "no checkpoint, starting at step 0"
    for note in restored.notes:
        print(f"[{run.stage}] {note}", flush=True)
    run.loader.set_state(restored.host["loader"])
    run.ledger.resume(run.stage, restored.step, notes=list(restored.notes))
    return restored.state, restored.step, f"going on from the checkpoint of step {restored.step}"


def _started_from(plan: StatePlan, initial: Mapping[str, np.ndarray]) -> TrainState:
    """Return the state at step 0 with some arrays given; each is placed twice, as parameter and as average."""
    state = plan.create()
    parts: dict[str, Arrays] = {part: state[part] for part in ("params", "ema", "rest")}
    for part, arrays in parts.items():
        layout = plan.shardings[part]
        for name in initial.keys() & arrays.keys():
            # Not the host's memory: the first update gives these buffers away.
            given = jax.device_put(np.asarray(initial[name]), layout[name], may_alias=False)
            if np.ma.is_masked(initial[name]):
                choose = jax.jit(jnp.where, out_shardings=layout[name])
                given = choose(np.ma.getmaskarray(initial[name]), arrays[name], given)
            arrays[name] = given
    return state


def _compile(
    run: StageRun,
    plan: StatePlan,
    optimizer: optax.GradientTransformationExtraArgs,
    batch: dict[str, jax.Array],
    progress: Progress,
) -> tuple[Callable[..., Any], float]:
    """Compile the step ahead, so that its memory is known before the first update."""
    function = make_train_step(plan.static, optimizer, run.recipe, accumulation_steps=run.settings.accumulation_steps)
    root = jax.random.key(run.seed)
    shardings = (plan.shardings, {name: leaf.sharding for name, leaf in batch.items()}, replicated(run.mesh))
    jitted = jax.jit(
        function, in_shardings=shardings, out_shardings=(plan.shardings, replicated(run.mesh)), donate_argnums=0
    )
    traced = jitted.trace(plan.like, batch, root)
    flops = count_equations(traced.jaxpr)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    if memory is not None:
        arguments, temporary = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
        progress.say(
            f"{flops / 1e9:.2f} GFLOP an update; {arguments:.0f} MiB of state and batch and {temporary:.0f} MiB of "
            "temporaries per device"
        )
    return compiled, flops


def _save(run: StageRun, store: CheckpointStore, step: int, state: TrainState, *, wait: bool) -> None:
    host = {"stage": run.stage, "seed": run.seed, "loader": run.loader.get_state(), "config": run.config_dict}
    store.save(step, dict(state), host, wait=wait)
    run.ledger.checkpoint(run.stage, step)


class _Validation:
    """Measures held-out images with the noise of training, the same at every visit; made when it is first due."""

    def __init__(self, run: StageRun, plan: StatePlan) -> None:
        self._run = run
        self._function = jax.jit(make_validation(plan.static, run.recipe))
        self._batch: dict[str, jax.Array] | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        if self._batch is None:
            assert self._run.held_out is not None
            self._batch = put_batch(self._run.held_out(), self._run.mesh)
        values = self._function(state, self._batch, jax.random.key(self._run.seed))
        return {name: float(value) for name, value in jax.device_get(values).items()}


class _Profile:
    """Traces some steps into a folder that TensorBoard's XProf reads; its trace.json.gz opens in Perfetto as well."""

    def __init__(self, folder: Path, steps: tuple[int, ...], start: int, total: int, stage: str) -> None:
        self._folder, self._is_on = folder, False
        self._first, self._last = steps or (0, 0)
        if steps and not start < self._first <= total:
            print(f"[{stage}] run.profile_steps={steps}: no trace, the steps to come are {start + 1} to {total}")

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Return what a step runs in."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._is_on = True
        if not self._is_on:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train_step", step_num=step)

    def done(self, step: int, metrics: Any) -> None:
        """End the trace after its last step, when the device has finished it."""
        if self._is_on and step == self._last:
            jax.block_until_ready(metrics)
            self.__exit__()

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            print(f"profile     written to {self._folder}: TensorBoard with xprof, or its *.trace.json.gz in Perfetto")


class _Watch:
    """Reads each step's numbers one step late, so that the device never waits for the host."""

    def __init__(self, run: StageRun, progress: Progress, tensorboard: TensorBoard) -> None:
        self.last: dict[str, float] = {}
        self._run = run
        self._progress = progress
        self._tensorboard = tensorboard
        self._pending: tuple[int, Any, np.ndarray] | None = None
        self._skipped_before: int | None = None

    def dispatched(self, step: int, metrics: Any, index: np.ndarray) -> None:
        """Take note of a step that has been started, and read the one before it."""
        self.drain()
        self._pending = (step, metrics, index)

    def drain(self) -> None:
        """Read what is pending; raise NonFiniteError when too many updates in a row were skipped."""
        if self._pending is None:
            return
        step, metrics, index = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.last = values
        run, in_a_row = self._run, int(values["nonfinite_in_a_row"])
        if in_a_row:
            run.ledger.skip(run.stage, step, index=index, loss=values["loss"], grad_norm=values["grad_norm"])
            self._progress.say(
                f"step {step}: loss {values['loss']} or gradient norm {values['grad_norm']} is not finite; update "
                f"skipped ({in_a_row} in a row), image ids {index[:8].tolist()}…"
            )
        else:
            run.ledger.step(
                run.stage, step, loss=values["loss"], grad_norm=values["grad_norm"], batch=batch_digest(index)
            )
            for sentence in run.remark(step, values) if run.remark is not None else ():
                self._progress.say(f"step {step}: {sentence}")
                run.ledger.event("alarm", stage=run.stage, step=step, text=sentence)
        if in_a_row >= run.settings.max_nonfinite_in_a_row:
            raise NonFiniteError(
                f"{in_a_row} updates in a row were not finite, up to step {step}; expected fewer than "
                f"max_nonfinite_in_a_row={run.settings.max_nonfinite_in_a_row}. Parameters are those before the first "
                f"of them, and the last checkpoint in {run.folder} is intact. Lower the learning rate, or look at the "
                f"images of the skipped steps in {run.ledger.path}."
            )
        if step % run.settings.log_every_steps == 0 or step == run.recipe.lengths.total_steps:
            shown = {name: values[name] for name in run.shown if name in values}
            rates = self._progress.update(step, shown)
            self._tensorboard.scalars(step, values | rates, prefix=run.stage)
            run.ledger.event("metrics", stage=run.stage, step=step, **values, **rates)
