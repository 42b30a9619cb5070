"""The door of the `jaxcache` command: what goes wrong becomes one line on stderr and an exit code.

0: done, and everything was right. 1: a replay found something wrong, or a snapshot is damaged. 2: wrong use (options,
trace files, a missing extra). The commands themselves are in `commands.py`, which needs the extra `cli`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from jaxcache.errors import CacheError

WRONG_USE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: Arguments after the program's name; those of the process by default.
    """
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return _complain(f"the command line needs {' and '.join(missing)}: pip install 'jaxcache[cli]'")
    from jaxcache.cli.commands import app

    try:
        app(args=sys.argv[1:] if argv is None else list(argv), prog_name="jaxcache")
    except CacheError as error:
        return _complain(str(error))
    except OSError as error:  # a file that is none, a full disk
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as ending:  # how typer ends every command
        return ending.code if isinstance(ending.code, int) else WRONG_USE if ending.code else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _complain(message: str) -> int:
    print(f"jaxcache: {message}", file=sys.stderr)
    return WRONG_USE
