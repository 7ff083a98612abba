"""What the commands do with a steered model after another tool: docs/tools.md says what is true."""

import logging

import pytest
from tools import PAGE, TOOLS, outcomes, page, row


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TOOLS)
def test_every_command_works_or_refuses(name):
    if not TOOLS[name].is_installed:
        pytest.skip(f"{TOOLS[name].package} is not installed")
    assert row(name, outcomes(name)) in PAGE.read_text().splitlines(), (
        "docs/tools.md is not what comes out: python tests/tools.py --write"
    )


def test_the_page_has_these_rows():
    rows = PAGE.read_text().splitlines()[-len(TOOLS) :]
    assert [text.split(" | ")[0].removeprefix("| ") for text in rows] == list(TOOLS)
    assert PAGE.read_text() == page(rows)
