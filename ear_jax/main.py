"""The entry point: command line to task, errors to exit statuses. It imports neither jax nor any task at the top."""

import importlib
import os
import sys
from collections.abc import Sequence

from ear_jax import command_line, program_cache
from ear_jax.errors import EarError
from ear_jax.tasks import TASKS

_INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task that the arguments ask for and return the exit status; faults of the user carry no traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if command_line.wants_help(arguments):
            return _print(command_line.help_text(arguments))
        if "--version" in arguments:
            return _print(command_line.version_text())
        request = command_line.read(arguments)
        program_cache.keep_programs(request.config.run.program_cache)
        module, _, function = TASKS[request.task].partition(":")
        task = getattr(importlib.import_module(module), function)
        task(request.config, request.workdir, model=request.model)
    except EarError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        return _INTERRUPTED_STATUS
    return 0


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help=all | head`; the interpreter must not flush into the closed pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def leave(status: int) -> None:
    """End the program; after a failure in a job of several processes at once, as winding down waits for the others."""
    process = sys.modules.get("ear_jax.distributed.process")
    if status and process is not None and process.jax.process_count() > 1:
        process.exit_now(status)
    sys.exit(status)


def run() -> None:
    """Run the command line and end the program: the console script and `python -m ear_jax`."""
    leave(main())


if __name__ == "__main__":
    run()
