"""The one exception type that users see, and the exit codes of the command line.

Every message says what is wrong, where (file, layer or option) and what to do about it. The command
line prints it as one line and exits with `exit_code`; a traceback is always a bug.
"""

from __future__ import annotations

EXIT_GATE = 1
EXIT_INPUT = 2
EXIT_TOOLCHAIN = 3


class EdgecError(Exception):
    """A mistake in what the user gave us.

    `what` states the exact condition, `where` names the file, layer or option, `hint` says what to do.
    `str(error)` is a single line made of the three.
    """

    exit_code = EXIT_INPUT

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        line = f"{where}: {what}" if where else what
        if hint:
            line = f"{line}; {hint}"
        super().__init__(" ".join(line.split()))


class GateFailed(EdgecError):
    """A check measured a larger drop than allowed (exit code 1)."""

    exit_code = EXIT_GATE


class ToolchainMissing(EdgecError):
    """A compiler, linker or emulator is not installed (exit code 3); the hint names the package."""

    exit_code = EXIT_TOOLCHAIN
