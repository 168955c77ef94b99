"""Secrets: neither in what is written, logged or sent, whether they come from a variable or stand in a word."""

import logging
import sys

import pytest

from spd_dist.errors import ConfigError
from spd_dist.launch import launcher
from spd_dist.overrides import load_config, to_yaml
from spd_dist.process.environment import environment
from spd_dist.redaction import HIDDEN, looks_secret, redacted, redacted_data, redacted_words
from spd_dist.tracking.console import set_up_logging

CANARY = "c4n4ry-5f1d9a7b"


TELLING = [
    "WANDB_API_KEY", "HF_TOKEN", "hf-token", "db.password", "AWS_SECRET_ACCESS_KEY", "key", "OPENAI_API_KEY_2",
    "apiKey", "Authorization", "GOOGLE_APPLICATION_CREDENTIALS_JSON",
]  # fmt: skip
OTHER = [
    "max_tokens", "TOKENIZERS_PARALLELISM", "pad_token", "num-key-value-heads", "monkey", "author", "seed", "keyboard",
    "SSH_AUTH_SOCK", "key_proj", "compass",
]  # fmt: skip
HELD = [
    f"eng --model m --key {CANARY} --port 80", f"eng --api-key={CANARY}", f"HF_TOKEN={CANARY} eng",
    f"eng -token {CANARY}", f"curl -H 'Authorization: Bearer {CANARY}'", f"https://user:{CANARY}@host/x",
    f"https://{CANARY}@host/x", f"https://user:a@b:{CANARY}@host/x",
    "hf_aaaaBBBBccccDDDDeeee", f"eng --json '{{\"api_key\": \"{CANARY}\"}}'", f"http://host/?token={CANARY}&n=1",
]  # fmt: skip
FREE = [
    "eng --model {model} --key {prompts} --max-tokens 512", "--token 5", "seed=3 key of it", "${oc.env:HF_TOKEN}",
    "runs/a: 3 of 5 tokens; see https://host:80/x", "write section.key=value, as in seed=3", "--key KEY",
]  # fmt: skip


@pytest.mark.parametrize("name", TELLING)
def test_telling_names_are_known(name):
    assert looks_secret(name)


@pytest.mark.parametrize("name", OTHER)
def test_other_names_are_left_alone(name):
    assert not looks_secret(name)


@pytest.mark.parametrize("text", HELD)
def test_what_stands_where_a_secret_does_is_hidden_and_nothing_else(text):
    hidden = redacted(text)
    assert CANARY not in hidden
    assert "BBBB" not in hidden
    assert HIDDEN in hidden
    assert all(part in hidden for part in ("--port 80", "eng", "&n=1", "@host/x") if part in text)


@pytest.mark.parametrize("text", FREE)
def test_text_without_secrets_stays_as_it_is(text):
    assert redacted(text) == text


def test_the_words_of_a_command_line_hide_the_word_after_a_telling_option():
    words = ["spd", "--key", CANARY, f"distributed.deepspeed.x.api_key={CANARY}", "--config", "a.yaml", "seed=3"]
    assert redacted_words(words) == [
        "spd", "--key", HIDDEN, f"distributed.deepspeed.x.api_key={HIDDEN}", "--config", "a.yaml", "seed=3",
    ]  # fmt: skip


def test_a_variable_of_a_command_is_written_as_the_interpolation_and_used_as_its_value(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINE_PLACE", CANARY)
    config = load_config([], ["generate.engine=command", "generate.command=eng -k ${oc.env:ENGINE_PLACE} {model}"])
    assert config.generate.command == f"eng -k {CANARY} {{model}}"
    text = to_yaml(config)
    assert CANARY not in text
    (tmp_path / "config.yaml").write_text(text)
    assert load_config([tmp_path / "config.yaml"]) == config


def test_a_secret_is_known_in_an_address_and_where_it_begins_as_a_path_does(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_PASSWORD", "p@ss/word+1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"/{CANARY}")
    monkeypatch.setenv("SERVICE_KEY", str(tmp_path))
    found = redacted(f"https://host/?next=p%40ss%2Fword%2B1 and /{CANARY} and {tmp_path}/key.json")
    assert found == (
        "https://host/?next=${oc.env:SOME_PASSWORD} and ${oc.env:AWS_SECRET_ACCESS_KEY} and " + f"{tmp_path}/key.json"
    )


def test_a_traceback_holds_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("SOME_PASSWORD", CANARY)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    @launcher
    def main(words):
        raise RuntimeError(f"no answer of {CANARY}")

    with pytest.raises(RuntimeError) as failed:
        main([])
    sys.excepthook(failed.type, failed.value, failed.tb)
    said = capsys.readouterr().err
    assert "RuntimeError: no answer of ${oc.env:SOME_PASSWORD}" in said
    assert CANARY not in said


def test_data_is_hidden_by_its_key_or_by_its_value(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", CANARY)
    found = redacted_data({"a": [f"x {CANARY} y"], "token": "abc", "max_tokens": 5, "b": {"password": f"{CANARY}"}})
    assert found == {"a": ["x ${oc.env:SOME_PASSWORD} y"], "token": HIDDEN, "max_tokens": 5,
                     "b": {"password": "${oc.env:SOME_PASSWORD}"}}  # fmt: skip


def test_neither_the_environment_nor_lines_nor_errors_hold_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setattr(sys, "argv", ["spd", "--key", "literal-secret", f"x={CANARY}"])
    loggers = logging.getLogger("spd_dist")
    monkeypatch.setattr(loggers, "handlers", [])
    set_up_logging(0, sys.stderr)
    loggers.warning("calling %s --key literal-secret", CANARY)
    error = str(ConfigError(f"generate.command: 'eng {CANARY} --token literal-secret' is not valid"))
    lone = type("Lone", (), {"size": 1, "device": type("Device", (), {"type": "cpu"})})()
    everything = capsys.readouterr().err + error + str(environment(lone))
    assert "calling" in everything
    assert CANARY not in everything
    assert "literal-secret" not in everything
