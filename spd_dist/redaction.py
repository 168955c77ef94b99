"""What must stay secret, kept out of all that a run writes, logs or sends.

A secret is known by where it comes from: an environment variable with a telling name, or any that `generate.command`
takes by `${oc.env:NAME}`; or by where it stands: after `--key`, `token=`, `Bearer`, or in an address. The first is
written as the interpolation that gives it again, the second as `***`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from spd_dist.types import Json

HIDDEN = "***"
MIN_LETTERS = 8
"""A shorter value of a variable could stand in a text by chance."""

_ANYWHERE = frozenset(["APIKEY", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"])
_LAST = frozenset(["KEY", "KEYS", "TOKEN", "PASS", "PW", "AUTH", "AUTHORIZATION", "BEARER", "COOKIE", "DSN"])
"""Parts of a telling name: wherever they stand, and only at its end."""
_NOT_SECRET = frozenset(
    ["PAD", "EOS", "BOS", "UNK", "SEP", "CLS", "MASK", "IMAGE", "START", "END", "MAX", "NEW", "NUM"]
)
"""What stands before TOKEN or KEY where it names something that everybody may know."""
_FROM_COMMAND: set[str] = set()
"""The variables that the command of this process's config takes."""

_INTERPOLATION = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
_OPTION = re.compile(r"(?P<before>(?<![\w-])--?(?P<name>[A-Za-z][\w-]*)(?:\s+|=))(?P<value>[^\s'\"${-][^\s'\"]*)")
_ASSIGNED = re.compile(r"(?P<before>(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)\s?=\s?)(?P<value>[^\s'\"${&][^\s'\"&]*)")
_QUOTED = re.compile(r"(?P<before>\"(?P<name>[A-Za-z_][\w.-]*)\"\s*:\s*\")(?P<value>[^\"${][^\"]*)")
_HEADER = re.compile(r"(?P<before>\b(?:Bearer|Basic)\s+)[\w.~+/=-]{6,}")
_ADDRESS = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://(?:[^\s/:@]*:)?)[^\s/]+(?=@)")
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[a-z]-[\w-]{10,}|wandb_v1_\w{16,})"
)


def looks_secret(name: str) -> bool:
    """Whether a variable, option or key of this name holds a secret: `WANDB_API_KEY`, `--hf-token`, `auth.password`."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1_\2", name)
    parts = [part for part in re.split(r"[^A-Z]+", spaced.upper()) if part]
    is_last = bool(parts) and parts[-1] in _LAST and not (len(parts) > 1 and parts[-2] in _NOT_SECRET)
    return is_last or not _ANYWHERE.isdisjoint(parts)


def keep_secret(command: str) -> None:
    """From now on, what the variables hold that this text takes by `${oc.env:NAME}` is secret."""
    _FROM_COMMAND.update(_INTERPOLATION.findall(command))


def redacted(text: str) -> str:
    """`text` without what is secret in it."""
    text = without_variables(text)
    text = _HEADER.sub(rf"\g<before>{HIDDEN}", text)
    text = _ADDRESS.sub(rf"\g<before>{HIDDEN}", text)
    text = _KNOWN_FORMS.sub(HIDDEN, text)
    for form in (_OPTION, _ASSIGNED, _QUOTED):
        text = form.sub(_hide, text)
    return text


def without_variables(text: str) -> str:
    """`text` with the interpolation where a secret variable's value stands."""
    for value, name in _secrets():
        if value in text:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without what is secret in them; a secret may be the word after its option."""
    options = [re.fullmatch(r"--?([A-Za-z][\w-]*)", word) for word in words]
    follows = [False, *(option is not None and looks_secret(option[1]) for option in options)]
    return [
        HIDDEN if is_value and not word.startswith("-") else redacted(word)
        for word, is_value in zip(words, follows, strict=False)
    ]


def settings_of(config: Any) -> Mapping[str, Json]:
    """A config, which is a dataclass, as plain data to be written, sent and hashed."""
    return redacted_data(dataclasses.asdict(config))


def redacted_data(value: Any, name: str = "") -> Any:
    """Plain data without what is secret in it: by its key, or in a text."""
    if isinstance(value, Mapping):
        return {key: redacted_data(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_data(item, name) for item in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if value and looks_secret(name) and "${" not in without_variables(value) else redacted(value)


def _hide(found: re.Match[str]) -> str:
    is_plain = re.fullmatch(r"[\d.,]+|(?:value|VALUE|KEY|TOKEN|NAME)[,;:.)]*", found["value"])
    return f"{found['before']}{HIDDEN}" if looks_secret(found["name"]) and not is_plain else found[0]


def _secrets() -> Iterable[tuple[str, str]]:
    """Value and name of every secret variable, the longest value first: one may be part of another."""
    found = [
        (value, name)
        for name, value in os.environ.items()
        if len(value) >= (MIN_LETTERS if name not in _FROM_COMMAND else 4)
        and (name in _FROM_COMMAND or (looks_secret(name) and not os.path.exists(value)))  # of a file is no secret
    ]
    found += [(quoted, name) for value, name in found if (quoted := quote(value, safe="")) != value]
    return sorted(found, key=lambda pair: (-len(pair[0]), pair[1]))
