"""The settings' parse table: every name, its default, good and bad values."""

from __future__ import annotations

import pytest

from dist_lowbit.core import settings as module
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.settings import PREFIX, Settings, parse

DEFAULTS = Settings()

GOOD = [
    ("ISA", "avx2", "isa", "avx2"),
    ("ISA", "auto", "isa", "auto"),
    ("BACKEND", "shm", "backend", "shm"),
    ("COMPUTE", "fp32", "compute", "fp32"),
    ("COMPUTE", "int8", "compute", "int8"),
    ("TIMEOUT", "5", "timeout", 5.0),
    ("TIMEOUT", "0.25", "timeout", 0.25),
    ("LOAD_TIMEOUT", "1e3", "load_timeout", 1000.0),
    ("DECODER", "torch", "decoder", "torch"),
    ("KV_CACHE_DTYPE", "int8", "kv_cache_dtype", "int8"),
    ("LOG", "debug", "log", "debug"),
    ("LIBRARY", "/opt/lib.so", "library", "/opt/lib.so"),
    ("LIBRARY", "none", "library", "none"),
]

BAD = [
    ("TIMEOUT", "soon", r"DIST_LOWBIT_TIMEOUT is 'soon'; expected a number of seconds"),
    ("TIMEOUT", "0", r"DIST_LOWBIT_TIMEOUT is '0'; expected more than 0 seconds"),
    ("TIMEOUT", "-1", r"expected more than 0 seconds"),
    ("TIMEOUT", "nan", r"expected more than 0 seconds"),
    ("LOAD_TIMEOUT", "inf", r"DIST_LOWBIT_LOAD_TIMEOUT is 'inf'; expected more than 0 seconds, and an end"),
    ("DECODER", "onnx", r"DIST_LOWBIT_DECODER is 'onnx'; expected auto, native, torch or off"),
    ("KV_CACHE_DTYPE", "int3", r"DIST_LOWBIT_KV_CACHE_DTYPE is 'int3'; expected auto, fp32, fp16, bf16 or int8"),
    ("COMPUTE", "bf16", r"DIST_LOWBIT_COMPUTE is 'bf16'; expected int8 or fp32"),
    ("TIMEOUTS", "1", r"DIST_LOWBIT_TIMEOUTS is no setting; the settings are DIST_LOWBIT_ISA, .*, DIST_LOWBIT_LIBRARY"),
]


def test_defaults() -> None:
    assert parse({}) == DEFAULTS
    assert (DEFAULTS.compute, DEFAULTS.timeout, DEFAULTS.library) == ("int8", 60.0, "")


def test_the_table_covers_every_setting_and_there_are_ten_at_most() -> None:
    names = set(Settings.__dataclass_fields__)
    assert {field for _, _, field, _ in GOOD} == names
    assert len(names) <= 10


@pytest.mark.parametrize(("name", "text", "field", "value"), GOOD)
def test_good_values(name: str, text: str, field: str, value: object) -> None:
    parsed = parse({PREFIX + name: text, "PATH": "/bin", "TIMEOUT": "x"})
    assert getattr(parsed, field) == value
    assert type(getattr(parsed, field)) is type(value)
    others = set(Settings.__dataclass_fields__) - {field}
    assert all(getattr(parsed, other) == getattr(DEFAULTS, other) for other in others)


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_values_are_sentences(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({PREFIX + name: text})


@pytest.mark.parametrize("name", [*(name.upper() for name in Settings.__dataclass_fields__), "NO_SUCH"])
def test_an_empty_value_is_none(name: str) -> None:
    assert parse({PREFIX + name: ""}) == DEFAULTS


@pytest.mark.parametrize("name", ["TEST_DATA", "TEST_ANYTHING", "LAUNCH_RANK"])
def test_names_of_the_test_suite_and_the_launcher_are_not_ours(name: str) -> None:
    assert parse({PREFIX + name: "1"}) == DEFAULTS


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module.settings.cache_clear()
    try:
        monkeypatch.setenv("DIST_LOWBIT_TIMEOUT", "7")
        first = module.settings()
        monkeypatch.setenv("DIST_LOWBIT_TIMEOUT", "8")
        assert module.settings() is first
        assert first.timeout == 7
    finally:
        module.settings.cache_clear()
