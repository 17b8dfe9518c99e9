"""The command ``bayes-svdo``, also as ``python -m bayes_svdo``: where Ctrl-C is one line at once.

Nothing but this is imported before the command is ready for it.
"""

import sys


def main() -> None:
    """The entry point."""
    try:
        from bayes_svdo.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("bayes-svdo: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
