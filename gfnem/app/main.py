"""The command line `gfnem`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gfnem import __version__
from gfnem.app import help as help_text
from gfnem.app.arguments import Command
from gfnem.app.loggers import let_loggers_speak
from gfnem.app.status import DONE, INTERRUPTED, USER_ERROR
from gfnem.errors import UserError
from gfnem.memory import is_out_of_memory

# What is heavy to import is imported where it is needed, so that help and errors come at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default); returns the exit status."""
    let_loggers_speak()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print("gfnem: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        # A full disk, a folder that may not be written: named by the error itself.
        return _failed(UserError(str(error)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _failed(UserError("there is not enough memory: make models and batches smaller"))


def _main(arguments: list[str]) -> int:
    command = Command.read(arguments)
    if "--help" in command.flags:
        print(help_text.text(command.verb, command.config_dir), end="")
        return DONE
    if "--version" in command.flags:
        print(f"gfnem {__version__}")
        return DONE
    if "--shell-completion" in command.flags:
        from gfnem.app.completion import complete

        complete(command.given)
        return DONE
    if command.verb == "train":
        from gfnem.app.training import start

        return start(command)
    if command.flags.keys() - (set() if command.verb == "compare" else {"--config-dir"}):
        raise UserError(f"gfnem {command.verb} takes no flags: see gfnem {command.verb} --help")
    if command.verb == "compare":
        from gfnem.app.verbs import compare

        compare(command.given)
        return DONE
    from gfnem.app.verbs import use_run

    for line in use_run(command.verb, command.given, command.config_dir):
        print(line)
    return DONE


def _failed(error: UserError) -> int:
    print(f"gfnem: {error}", file=sys.stderr)
    return USER_ERROR
