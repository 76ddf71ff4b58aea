"""Start the command line: first the signals, then the heap, then what takes seconds to import.

Threads that importing starts would have heaps of their own.
"""

from jaxdistill._memory import keep_pages
from jaxdistill._signals import listen


def main() -> None:
    """Run ``jaxdistill``; see ``jaxdistill.cli``."""
    listen()
    keep_pages()
    from jaxdistill import cli

    cli.main()


if __name__ == "__main__":
    main()
