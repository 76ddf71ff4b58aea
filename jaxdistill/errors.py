"""The one error a user's input can raise."""

from __future__ import annotations


class UserError(Exception):
    """Report bad input in one line: what was given, what is accepted, what to do.

    The command line prints it as ``error: <line>`` and exits with code 2. It is no ``ValueError``:
    the option parser would take it for its own and print a box around it.
    """
