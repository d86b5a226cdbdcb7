"""The browser of the page's tests."""

from tests.browser import browser, opened  # noqa: F401
