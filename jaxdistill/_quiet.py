"""Imported first, as it must come before the packages that take seconds to import.

The command line listens to signals, and transformers' warnings are silenced, because they are about
models that nobody here loads.
"""

import os

from jaxdistill._signals import is_command, listen

if is_command():
    listen()

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
