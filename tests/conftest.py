"""What all tests share."""


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about 15 s; CI runs it all the same")
