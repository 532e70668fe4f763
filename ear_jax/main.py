"""The entry point: command line to task, errors to exit statuses. It imports neither jax nor any task at the top."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from ear_jax import command_line, program_cache
from ear_jax.errors import ConfigError, EarError, StorageError
from ear_jax.files import as_storage_error
from ear_jax.tasks import TASKS

_INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task that the arguments ask for and return the exit status; faults of the user carry no traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _check_output()
        _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("Interrupted.", _INTERRUPTED_STATUS)
    except Exception as error:
        fault = _fault(error)
        if isinstance(fault, OutputError) and command_line.wants_help(arguments):
            return 0  # `--help=all | head`: its reader has what it wanted
        if fault is not None:
            return _say(f"{type(fault).__name__}: {fault}", fault.exit_status)
        with contextlib.suppress(OSError):
            # In a job of several processes this is the hook that ends them all.
            sys.excepthook(type(error), error, error.__traceback__)
        return EarError.exit_status
    return 0


def _run(arguments: Sequence[str]) -> None:
    if command_line.wants_help(arguments):
        return print(command_line.help_text(arguments))
    if "--version" in arguments:
        return print(command_line.version_text())
    _drop_what_changes_numbers()  # before a recipe, which may import jax
    request = command_line.read(arguments)
    program_cache.keep_programs(request.config.run.program_cache)
    module, _, function = TASKS[request.task].partition(":")
    task = getattr(importlib.import_module(module), function)
    task(request.config, request.workdir, model=request.model)


def _drop_what_changes_numbers() -> None:
    """Keep the same run the same: the optimiser's scalars follow JAX_ENABLE_X64, and every draw the other."""
    for name, usual in {"JAX_ENABLE_X64": ("", "0", "false"), "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",)}.items():
        value = os.environ.pop(name, usual[0])
        if value.lower() not in usual:
            print(f"warning     {name}={value} is not used: it would change what the same seed gives", flush=True)


def _say(text: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    return status


class OutputError(StorageError):
    """Nobody reads standard output."""


def _check_output() -> None:
    """Make sure that descriptors 1 and 2 are taken: a file that is opened later would get them, and what is printed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        raise StorageError("Standard output is closed; send it to a file, or to nobody by >/dev/null.")


def _fault(error: Exception) -> EarError | None:
    """Return what a user can do about an error, or None for a programming fault."""
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return OutputError("Nobody reads standard output any more (closed pipe). Send it to a file to see all of it.")
    unwritable = _output_fault(probe=as_storage_error(error, "") is not None and not isinstance(error, EarError))
    if isinstance(error, EarError) or unwritable:
        return error if isinstance(error, EarError) else unwritable
    return as_storage_error(error, "reading or writing") or _missing_accelerator()


def _missing_accelerator() -> ConfigError | None:
    jax = sys.modules.get("jax")
    if jax is None or not jax.config.jax_platforms:
        return None
    try:
        jax.devices()  # the error itself names nothing: an AssertionError somewhere in JAX
    except (AssertionError, RuntimeError):
        return ConfigError(
            f"JAX_PLATFORMS={jax.config.jax_platforms}: JAX cannot start it. Install the extra that brings it "
            "(ear_jax[cuda13], [cuda12] or [tpu]) on a machine that has one, or write JAX_PLATFORMS=cpu."
        )
    return None


def _output_fault(*, probe: bool) -> StorageError | None:
    """Return why standard output cannot be written, or None; `probe` asks it, as a failed write may leave no trace."""
    try:
        if probe:
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        return StorageError(f"Standard output cannot be written: {error.strerror}. Send it to where there is space.")
    return None


def _drop_output() -> None:
    # The interpreter must not flush into it again when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(status: int) -> None:
    """End the program; after a failure in a job of several processes at once, as winding down waits for the others."""
    process = sys.modules.get("ear_jax.distributed.process")
    # Counting processes starts the accelerator, which may be what failed.
    if status and process and process.jax.distributed.is_initialized() and process.jax.process_count() > 1:
        process.exit_now(status)
    sys.exit(status)


def run() -> None:
    """Run the command line and end the program: the console script and `python -m ear_jax`."""
    leave(main())


if __name__ == "__main__":
    run()
