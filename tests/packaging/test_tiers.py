"""The tiers and the skip gate of tests/conftest.py, tried on small suites."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parent.parent / "conftest.py"
INI = "[pytest]\nmarkers = slow: takes long\n"
SUITE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(25))
def test_slow(n): pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our conftest and a list of one skip."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each run would import hypothesis anew
    pytester.makeini(INI)
    tests = pytester.mkdir("tests")
    (tests / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tests / "skips.toml").write_text(
        '[[skip]]\nreason = "no * here"\nwhy = "a machine may lack one"\n', encoding="utf-8"
    )
    (tests / "test_it.py").write_text(SUITE, encoding="utf-8")
    return pytester


@pytest.mark.parametrize(
    ("options", "passed", "deselected"),
    [([], 1, 25), (["--slow"], 26, 0), (["--slow-tenth", "a"], 3, 23)],
    ids=["quick", "all", "tenth"],
)
def test_tiers(suite: pytest.Pytester, options: list[str], passed: int, deselected: int) -> None:
    suite.runpytest_inprocess("tests", *options).assert_outcomes(passed=passed, deselected=deselected)


def test_a_seed_draws_the_same_tenth_and_another_seed_another(suite: pytest.Pytester) -> None:
    def drawn(seed: str) -> list[str]:
        lines = suite.runpytest_inprocess("tests", "-v", "--slow-tenth", seed).outlines
        return [line.split()[0] for line in lines if "PASSED" in line]

    assert drawn("one") == drawn("one")
    assert len({tuple(drawn(seed)) for seed in "abcdef"}) > 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def test_it(): pytest.skip('no GPU here')", 0),
        ("def test_it(): pytest.skip('felt like it')", 1),
        ("@pytest.mark.skip(reason='felt like it')\ndef test_it(): pass", 1),
        ("@pytest.mark.xfail(reason='felt like it')\ndef test_it(): assert False", 1),
        ("pytest.skip('felt like it', allow_module_level=True)", 1),
        ("pytest.importorskip('no_such_module_at_all')", 1),
    ],
    ids=["listed", "call", "mark", "xfail", "module", "import"],
)
def test_an_unlisted_skip_fails_the_run(suite: pytest.Pytester, body: str, code: int) -> None:
    (suite.path / "tests" / "test_skips.py").write_text(f"import pytest\n{body}\n", encoding="utf-8")
    result = suite.runpytest_inprocess("tests")
    assert result.ret == code
    shown = "skips that tests/skips.toml does not list" in result.stdout.str()
    assert shown == bool(code)


def test_the_record_holds_counts_and_skips(suite: pytest.Pytester) -> None:
    (suite.path / "tests" / "test_skips.py").write_text(
        "import pytest\ndef test_it(): pytest.skip('no GPU here')\n", encoding="utf-8"
    )
    suite.runpytest_inprocess("tests", "--record", "record.md")
    text = (suite.path / "record.md").read_text(encoding="utf-8")
    assert "1 passed, 1 skipped" in text
    assert "- 1 x no GPU here" in text
