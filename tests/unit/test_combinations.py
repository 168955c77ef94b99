"""Two settings that cannot work together are one sentence that names both and mends it; the page says the same."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from spd_dist.config.combinations import COMBINATIONS, Combination
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config
from spd_dist.redaction import settings_of
from spd_dist.storage.settings import settings_by_key


def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(f"docs/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compatibility, settings = script("compatibility"), script("settings")

rows = pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: " with ".join(row.keys))


@rows
def test_a_combination_is_refused_by_a_sentence_with_both_keys_and_a_way_out(row: Combination):
    with pytest.raises(ConfigError) as caught:
        load_config([], row.example)
    sentence = str(caught.value)
    assert sentence.startswith(f"{row.keys[0]}: ")
    assert f" is not valid with {row.keys[1]}=" in sentence
    assert sentence.endswith(f"; set {' or '.join(row.instead)}")


@rows
def test_each_way_out_is_one(row: Combination):
    for word in row.instead:
        load_config([], [*row.example, re.sub("=N$", "=4", word)])


@rows
def test_an_example_has_no_other_fault_than_its_own(row: Combination):
    first = next(other for other in COMBINATIONS if other.breaks(_unchecked(row)))
    assert first is row


def _unchecked(row: Combination) -> object:
    """The config of its example, which `load_config` would refuse."""
    from spd_dist.config import Config
    from spd_dist.overrides import _build, _merged

    return _build(Config, _merged([], row.example), "")


def test_no_pair_stands_twice_and_the_defaults_have_none():
    assert len({row.keys for row in COMBINATIONS}) == len(COMBINATIONS)
    load_config([], [])


@pytest.mark.seconds
def test_the_page_is_what_the_table_makes():
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page()
    assert "no (" in compatibility.page()


def test_the_page_of_settings_is_what_the_fields_make():
    assert settings.PAGE.read_text(encoding="utf-8") == settings.page()
    keys = set(settings_by_key(settings_of(load_config([], []))))
    listed = set(re.findall(r"^\| `([\w.]+)`", settings.page(), re.MULTILINE))
    assert keys <= listed
