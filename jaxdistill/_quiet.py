"""Imported first, as it must come before the packages that take seconds to import.

The command line keeps one heap and listens to signals, in this order: the listening thread would
have a heap of its own. transformers' warnings are silenced, because they are about models that
nobody here loads.
"""

import os

from jaxdistill._memory import keep_pages
from jaxdistill._signals import is_command, listen

if is_command():
    keep_pages()
    listen()

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
