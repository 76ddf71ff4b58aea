"""The one error a user's input can raise."""

from __future__ import annotations

_LONGEST = 1000  # characters of a message


class UserError(Exception):
    """Report bad input in one line: what was given, what is accepted, what to do.

    The command line prints it as ``error: <line>`` and exits with code 2. It is no ``ValueError``:
    the option parser would take it for its own and print a box around it.

    Names from files stand in messages, so what cannot be printed (line ends, terminal codes, half
    characters) is escaped, and the middle of what is too long is left out.
    """

    def __init__(self, message: str) -> None:
        if not message.isprintable():
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - 300]} ... {message[-295:]}"
        super().__init__(message)
