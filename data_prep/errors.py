"""The one root of every error that a user can mend. The command line prints it as one line and exits with code 2."""

from __future__ import annotations

EXIT_WRONG_INPUT = 2


class DepthpipeError(Exception):
    """A wrong input. The message is one line: it names the file or key, and says what to do.

    Anything else that is raised is a bug of depthpipe and keeps its traceback.
    """
