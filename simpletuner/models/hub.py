"""Files from repositories on the hub, through huggingface_hub and its cache, and its failures in our words."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.errors import ConfigError, MemoryLimitError, SimpleTunerError
from simpletuner.models.files import nearest_path

T = TypeVar("T")


def fetch_file(repository: str, name: str, revision: str | None) -> Path | None:
    """Download one file of a repository; None if the repository has no such file.

    Raises:
        ConfigError: there is no such repository or revision, or it may not be read.
        SimpleTunerError: the hub did not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, but means that nobody could be asked
            raise
        except EntryNotFoundError:
            return None

    return _in_our_words(repository, revision, fetch)


def fetch_files(repository: str, revision: str | None, allowed: Sequence[str], ignored: Sequence[str]) -> None:
    """Download the files of a repository whose names fit one of the patterns `allowed` and none of `ignored`.

    Raises:
        as `fetch_file`; MemoryLimitError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(repository, revision=revision, allow_patterns=list(allowed), ignore_patterns=list(ignored))

    _in_our_words(repository, revision, fetch)


def _in_our_words(repository: str, revision: str | None, fetch: Callable[[], T]) -> T:
    from huggingface_hub import errors

    # The base is httpx's or requests', by the release of huggingface_hub; all failures to connect are of it, or OSErrors.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        return fetch()
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repository} is gated: its owner wants its licence accepted",
            hint="Accept it on the model's page, then run `hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{repository} has no revision {revision!r}", hint="Leave revision out for the newest.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ConfigError(
            f"{repository!r} is neither a folder here nor a repository on the hub",
            hint=f"{_meant(repository)}Check the spelling; a private repository needs `hf auth login` or HF_TOKEN.",
        ) from error
    except (OSError, http_error) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MemoryLimitError(
                f"the disk is full, so {repository} cannot be downloaded", hint="Make room, or set HF_HOME to another disk."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SimpleTunerError(
            f"{repository} cannot be downloaded: {reason}",
            hint=f"{_meant(repository)}Check the network and HF_ENDPOINT, or set pretrained_model_name_or_path to a folder that has the model.",
        ) from error


def _meant(repository: str) -> str:
    """What a name that is no folder here may have been meant to be."""
    near = nearest_path(repository)
    return f"Did you mean the folder {near}? " if near else ""
