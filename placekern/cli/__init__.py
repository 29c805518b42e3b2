"""The command line: compress, train, sensitivity, suggest, evaluate, inspect, export, info, demo.

Tables and pictures go to standard output and files, progress and errors to standard error, so that
`--json` can be piped. Exit codes: 0 done, 1 an error that is named in one sentence, 2 wrong usage.
"""

from .app import app, main

__all__ = ["app", "main"]
