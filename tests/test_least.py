"""A suite of which too little ran is not green; whoever asks for a part of it is not told so."""

import json

import pytest

from tests.least import NUMBERS

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_one(): pass
def test_two(): pass
@pytest.mark.skip(reason="no such machine")
def test_skipped(): pass
@pytest.mark.slow
def test_slow(): pass
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Run pytest on three tests of which one is skipped, and a slow one, with the least numbers given."""

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # none of them is needed, and they load for a second

    def run(least, *arguments, text=TESTS):
        (pytester.path / "least.json").write_text(json.dumps({"not slow": least, "slow": 1}))
        pytester.makeconftest(
            "from tests.least import count\ndef pytest_configure(config): count(config, 'least.json')"
        )
        pytester.makeini("[pytest]\ntestpaths = .\naddopts = -ra -m 'not slow' -p no:cacheprovider\nmarkers = slow")
        pytester.makepyfile(test_it=text)
        return pytester.runpytest_inprocess(*arguments)

    return run


def test_enough_tests_are_green_and_a_skip_tells_its_reason(suite):
    done = suite(2)
    assert done.ret == 0
    done.stdout.fnmatch_lines("SKIPPED * no such machine")


def test_too_few_are_a_failure_that_says_how_many_ran(suite):
    done = suite(3)
    assert done.ret == 1
    done.stdout.fnmatch_lines("FAILED: 2 tests ran of `-m 'not slow'`, at least 3 must (tests/least.json)")


def test_the_slow_suite_has_a_number_of_its_own(suite):
    assert suite(3, "-m", "slow").ret == 0


@pytest.mark.parametrize("part", [["-k", "one"], ["test_it.py"], ["--collect-only"], ["-m", "slow or not slow"]])
def test_a_part_of_a_suite_is_not_counted(suite, part):
    assert suite(99, *part).ret == 0


def test_a_skip_without_a_reason_is_a_failure(suite):
    done = suite(2, text=TESTS + "\ndef test_more(): pytest.skip()\n")
    assert done.ret == 1
    done.stdout.fnmatch_lines("FAILED: test_it.py::test_more was skipped without a reason")


def test_both_suites_of_this_repository_have_a_number(pytestconfig):
    numbers = json.loads(NUMBERS.read_text())
    assert numbers.keys() == {"not lab and not slow", "slow and not lab"}
    assert all(isinstance(n, int) and n > 0 for n in numbers.values())
    assert pytestconfig.getini("addopts")[-2:] == ["-m", "not lab and not slow"]
