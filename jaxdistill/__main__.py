"""Start the command line, the heap first: threads that importing starts would have their own."""

from jaxdistill._memory import keep_pages


def main() -> None:
    """Run ``jaxdistill``; see ``jaxdistill.cli``."""
    keep_pages()
    from jaxdistill import cli

    cli.main()


if __name__ == "__main__":
    main()
