"""The console of a process."""

from contextlib import suppress

from gristmill.progress import console, quiet


def test_a_quiet_console_prints_again_afterwards_even_after_an_error() -> None:
    seen = [console.quiet]
    with suppress(RuntimeError), quiet(True):
        seen.append(console.quiet)
        with quiet(False):
            seen.append(console.quiet)
        seen.append(console.quiet)
        raise RuntimeError
    assert [*seen, console.quiet] == [False, True, False, True, False]
