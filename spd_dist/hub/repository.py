"""A repository of the hub: made private, written to with patience, read at one revision, refused in one sentence."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from spd_dist.errors import ConfigError, DataError, UserError
from spd_dist.storage.subspace_file import FILE_NAME

log = logging.getLogger(__name__)
T = TypeVar("T")

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed."""
TRANSPORT_ERROR: Any = HfHubHTTPError.__bases__[0]
"""Of whichever client library huggingface_hub speaks through: no answer at all."""
LONGEST_WAIT_SECONDS = 60.0
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Repository:
    """Where something of the hub is, or belongs."""

    name: str
    """`OWNER/NAME`."""
    kind: Literal["model", "dataset"] = "model"
    is_public: bool = False
    """Whether what is pushed there may be seen by everybody."""


@dataclass(frozen=True)
class Patience:
    """How often a request is made that the hub did not answer, or answered by being busy."""

    num_attempts: int = 6
    first_wait_seconds: float = 2.0
    """Each wait is twice the one before, up to a minute."""

    def __post_init__(self) -> None:
        if self.num_attempts < 1:
            raise ConfigError(f"--attempts: {self.num_attempts} is out of bounds; it must be at least 1")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form `OWNER/NAME`, and no file or folder of this name is here."""
    return NAME.fullmatch(text) is not None and not Path(text).exists()


def upload(folder: Path, repository: Repository, message: str, patience: Patience | None = None) -> str:
    """Put every file of `folder` into `repository`, which is made if there is none; give the commit's address.

    Stopped at any time, the same call goes on: content that has arrived is not sent again, and where nothing has
    changed there is no commit.

    Raises:
        ConfigError: a name that is none; HF_HUB_OFFLINE is set; the repository is public, and was not meant to be.
        DataError: the hub refuses it.
        UserError: the hub did not answer, as often as `patience` says.
    """
    if NAME.fullmatch(repository.name) is None:
        raise ConfigError(f"hub name {repository.name!r} is not valid; write OWNER/NAME, as in me/qwen-spd")
    if constants.is_offline_mode():
        raise ConfigError(f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repository.name}; unset it")
    patience, api = patience or Patience(), HfApi()
    _attempt(lambda: _make(api, repository), repository, patience)
    done = _attempt(
        lambda: api.upload_folder(
            repo_id=repository.name, repo_type=repository.kind, folder_path=folder, commit_message=message
        ),
        repository,
        patience,
    )
    return str(done.commit_url)


def download(name: str, path: str, revision: str | None = None) -> Path:
    """One file of a model repository at a branch, tag or commit (`main` if none is given), from the cache if there.

    Raises:
        DataError: no such repository, revision or file; no network and nothing in the cache.
    """
    where = f"{name}@{revision or 'main'}"
    try:
        return Path(hf_hub_download(name, path, revision=revision))
    except LocalEntryNotFoundError as error:
        network = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub does not answer"
        raise DataError(
            f"{where} has no {path} in this host's cache, and {network}; load it once where there is a network, with "
            "HF_HOME on a shared disk"
        ) from error
    except EntryNotFoundError as error:
        raise DataError(f"{where} holds no {path}; name a repository that was pushed by `spd push`") from error
    except HfHubHTTPError as error:
        raise DataError(f"{where}: {_refusal(error)}") from error


def subspace_file(name: str | Path, revision: str | None = None) -> Path:
    """The file of a subspace that is named by itself, by its folder, by a run's folder, or as `OWNER/NAME` of the hub.

    Raises:
        ConfigError: a revision of something that is not on the hub.
        DataError: the hub has no such subspace, or does not answer.
    """
    if is_hub_name(str(name)):
        try:
            return download(str(name), FILE_NAME, revision)
        except DataError as error:
            raise DataError(f"{name}: no such folder here (from {Path.cwd()}), and of the hub: {error}") from error
    if revision is not None:
        raise ConfigError(f"revision {revision!r}: {name} is here and has no revisions; leave it out")
    path = Path(name)
    places = (path / "project" / FILE_NAME, path / FILE_NAME)
    return next((place for place in places if place.is_file()), places[0]) if path.is_dir() else path


def _make(api: HfApi, repository: Repository) -> None:
    """See that there is the repository, and that it shows its content to nobody who should not see it."""
    api.create_repo(repository.name, repo_type=repository.kind, private=not repository.is_public, exist_ok=True)
    found = api.repo_info(repository.name, repo_type=repository.kind)
    if not (found.private or repository.is_public):
        raise ConfigError(
            f"{repository.name} is a public repository; make it private on the hub, or add --public to push there"
        )


def _attempt(action: Callable[[], T], repository: Repository, patience: Patience) -> T:
    wait = patience.first_wait_seconds
    for attempt in range(1, patience.num_attempts + 1):
        try:
            return action()
        except (TRANSPORT_ERROR, JSONDecodeError, RuntimeError) as raised:
            # A file that did not arrive is a RuntimeError of whichever thread sent it.
            error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT:
                raise DataError(f"{repository.name}: {_refusal(error)}") from error
            if attempt == patience.num_attempts:
                raise UserError(
                    f"{repository.name}: the hub did not take it in {attempt} attempts ({_first_line(error)}); start "
                    "the same command again: what has arrived is not sent again"
                ) from error
            log.warning("%s: %s; attempt %d in %.0f s", repository.name, _first_line(error), attempt + 1, wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("num_attempts is at least 1")


def _refusal(error: HfHubHTTPError) -> str:
    """What the hub says, and what to do."""
    remedies = {
        401: "log in by `hf auth login`, or set HF_TOKEN",
        403: "use a token that may write there: `hf auth login`, or HF_TOKEN",
        404: "correct its name or revision, or log in if it is private (`hf auth login`, HF_TOKEN)",
    }
    status = error.response.status_code
    return f"the hub answers {status} ({_first_line(error)}); {remedies.get(status, 'correct what it names')}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
