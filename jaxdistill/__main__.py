"""Start the command line: first the heap, then the signals, then what takes seconds to import.

Threads that the other two start would have heaps of their own.
"""

from jaxdistill._memory import keep_pages
from jaxdistill._signals import listen


def main() -> None:
    """Run ``jaxdistill``; see ``jaxdistill.cli``."""
    keep_pages()
    listen()
    from jaxdistill import cli

    cli.main()


if __name__ == "__main__":
    main()
