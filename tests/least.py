"""Green means ran: a whole suite fails when fewer tests ran than tests/least.json says, or one was skipped unexplained.

Hooks that tests/conftest.py takes on. Imports pytest.
"""

import json
from pathlib import Path

import pytest

NUMBERS = Path(__file__).with_name("least.json")
"""{marks of a suite, as after `pytest -m`: tests that run at least, on a machine without GPU and namespaces}."""
NO_REASON = ("Skipped", "Skipped: ", "Skipped: unconditional skip")


class Least:
    """Counts the tests that ran, passed or failed; skipped ones did not."""

    def __init__(self, suite, least):
        self.suite, self.least, self.ran, self.unexplained = suite, least, 0, []

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call" and not report.skipped
        if report.skipped and not hasattr(report, "wasxfail") and report.longrepr[2] in NO_REASON:
            self.unexplained.append(report.nodeid)

    def wrong(self):
        """What is wrong, in words; empty if nothing is."""
        few = f"{self.ran} tests ran of `-m '{self.suite}'`, at least {self.least} must (tests/{NUMBERS.name})"
        return [few] * (self.ran < self.least) + [f"{test} was skipped without a reason" for test in self.unexplained]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.wrong() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for words in self.wrong():
            terminalreporter.write_line(f"FAILED: {words}", red=True)


def count(config, numbers=NUMBERS):
    """Count if all tests of one of the suites are asked for: no paths, no `-k`, nothing left out."""
    chosen = config.option
    less = ("keyword", "collectonly", "lf", "deselect", "ignore", "maxfail")  # lf only where pytest has its cache
    whole = config.args_source == config.ArgsSource.TESTPATHS and not any(getattr(chosen, x, False) for x in less)
    least = json.loads(Path(numbers).read_text()).get(chosen.markexpr) if whole else None
    if least is not None and not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers report to this
        config.pluginmanager.register(Least(chosen.markexpr, least), "least")
