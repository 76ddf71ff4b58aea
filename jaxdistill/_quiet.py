"""Imported first, as it must come before the packages that take seconds to import.

The command line listens to signals, and transformers' advice to install PyTorch is not for us, who
only tokenize.
"""

import os

from jaxdistill._signals import is_command, listen

if is_command():
    listen()

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
