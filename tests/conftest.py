"""What all tests share."""

import signal


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about 15 s; CI runs it all the same")
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and what the tests
    # start would inherit that: programs could then not show how they answer it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
