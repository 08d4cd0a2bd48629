"""`python -m gristmill.cli`: the command line without the installed script, as torchrun starts it."""

from gristmill.cli import main

if __name__ == "__main__":
    main()
