"""Publish what a run left on the hub: which files of it, in whose repository, and what is said if that cannot be.

The server is the one that HF_ENDPOINT names, the token that of `hf auth login` or HF_TOKEN; neither is written or shown anywhere.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, TypeVar

from simpletuner import __version__
from simpletuner.errors import ConfigError, SimpleTunerError, choose
from simpletuner.reporting.model_card import CARD_FILE, located

T = TypeVar("T")

WAITS_SECONDS = (5.0, 30.0)
"""How long to wait before a publication that failed is tried again, besides the tries that huggingface_hub itself makes."""
PATTERNS = (
    CARD_FILE,
    "card/*.jpg",
    "*.safetensors",
    "lycoris_config.json",
    "simpletuner_config.json",
    "ema/*.safetensors",
    "ema/lycoris_config.json",
)
"""What is published of a run's output folder, or of a checkpoint: neither optimizer states, nor logs, nor caches."""
PIPELINE = "pipeline"
"""The folder of a run that trained all weights; its content goes to the top of the repository, where diffusers looks for it."""
SURELY_WRONG = frozenset({400, 401, 403, 404, 413, 422})
"""Answers that would be the same at a second try."""
ANSWER_SECONDS = 15.0
"""How long the hub may take to say whose the token is and to make a repository; huggingface_hub itself would wait for ever."""
AGAIN = "Check the network and HF_ENDPOINT."


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder that are published, by their paths in the repository.

    Raises:
        ConfigError: there is nothing that was trained.
    """
    found = {path.relative_to(folder).as_posix(): path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()}
    whole = folder / PIPELINE
    found |= {path.relative_to(whole).as_posix(): path for path in sorted(whole.rglob("*")) if path.is_file()}
    if not any(name.endswith(".safetensors") for name in found):
        raise ConfigError(f"there is no adapter and no pipeline in {folder}", hint="Give the output folder of a finished run, or a checkpoint in it.")
    return found


def open_repository(name: str, *, private: bool) -> str:
    """Ask whose the token is, and make the repository if it is not there. Gives its whole name.

    Args:
        name: `name`, which is put under the account, or `owner/name`.
        private: whether a new repository is for its owners alone.

    Raises:
        ConfigError: there is no token, the hub does not accept it, or it may not write there.
        SimpleTunerError: the hub could not be asked, or did not answer in time.
    """
    from huggingface_hub import HfApi

    def ask() -> str:
        api = HfApi(library_name="simpletuner", library_version=__version__)
        account = api.whoami()
        whole = name if "/" in name else f"{account['name']}/{name}"
        refuse_foreign(account, whole)
        api.create_repo(whole, private=private, exist_ok=True)
        return whole

    return _in_our_words(lambda: within(ANSWER_SECONDS, ask), name)


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What a question gives or raises, asked on a thread that keeps nobody from going on or ending.

    Raises:
        TimeoutError: nothing came in that time.
    """
    answer: futures.Future[T] = futures.Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # which is raised where the answer is awaited
            answer.set_exception(error)

    threading.Thread(target=work, name="hub", daemon=True).start()
    try:
        return answer.result(seconds)
    except futures.TimeoutError as error:
        if answer.done():  # it is the question's own
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from error


def refuse_foreign(account: Mapping[str, Any], whole: str) -> None:
    """Refuse a token that can only read, and a repository of somebody else's; what the hub does not say of an account is not refused.

    Raises:
        ConfigError: names the account and what it may write.
    """
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ConfigError(
            "the token for the hub can only read", hint="Make one with write access on the page of your access tokens, and set HF_TOKEN."
        )
    owner = whole.partition("/")[0]
    writes = {account["name"], *(org["name"] for org in account.get("orgs") or () if org.get("roleInOrg") != "read")}
    if owner.lower() not in {one.lower() for one in writes}:
        raise ConfigError(
            f"hub_model_id {whole}: the account {account['name']} may not write to {owner}", hint=choose(owner, writes, "owners of this account")
        )


def publish(
    folder: Path,
    name: str,
    *,
    private: bool,
    message: str,
    waits: Sequence[float] = WAITS_SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload what a folder holds as one commit, in which all of it is there or nothing. Gives the address of the page.

    The page's snippet then loads from the repository.

    Args:
        name: as `open_repository` takes it.
        waits: seconds before each further try.
        say: told why it is tried again.

    Raises:
        ConfigError: nothing to publish, or refused for good.
        SimpleTunerError: the last try failed, too.
    """
    files = files_of(folder)
    for wait in (*waits, None):
        try:
            whole = open_repository(name, private=private)
            _point_card_to(files, whole)
            return _in_our_words(lambda whole=whole: _commit(whole, files, message), whole)  # type: ignore[misc]
        except ConfigError:
            raise
        except SimpleTunerError as error:
            if wait is None:
                raise
            say(f"{error.message}; trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("the last try ends it")


def _point_card_to(files: Mapping[str, Path], repository: str) -> None:
    card = files.get(CARD_FILE)
    if card is None:
        return
    before = card.read_text(encoding="utf-8")
    after = located(before, repository)
    if after != before:
        staged = card.with_name(f".{CARD_FILE}.tmp")
        staged.write_text(after, encoding="utf-8")
        staged.replace(card)  # and not in place: it may be linked from elsewhere


def _commit(repository: str, files: Mapping[str, Path], message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="simpletuner", library_version=__version__)
    api.create_commit(repository, [CommitOperationAdd(name, str(path)) for name, path in files.items()], commit_message=message)
    return f"{api.endpoint}/{repository}"


def _in_our_words(ask: Callable[[], T], name: str) -> T:
    from huggingface_hub import errors

    # The base is httpx's or requests', by the release of huggingface_hub; all failures to connect are of it, or OSErrors.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        return ask()
    except errors.LocalTokenNotFoundError as error:
        raise ConfigError(
            "there is no token for the hub", hint="Run `hf auth login`, or set HF_TOKEN; without push_to_hub none is needed."
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"hub_model_id {name!r} is no name of a repository: {_first_line(error)}", hint="Write name or owner/name.") from error
    except errors.HfHubHTTPError as error:
        raise _of_answer(error, name) from error
    except (OSError, http_error, RuntimeError, ValueError, KeyError, TypeError) as error:  # the last ones: an answer that makes no sense
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise SimpleTunerError(f"the hub cannot be reached for {name}: {_first_line(cause)}", hint=AGAIN) from error


def _of_answer(error: Any, name: str) -> SimpleTunerError:
    """A refusal of the hub's, in our words."""
    status = error.response.status_code if error.response is not None else 0
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the one of `hf auth login`"
    if status == 401:
        return ConfigError(f"the hub does not accept the token ({where})", hint="Run `hf auth login`, or set HF_TOKEN to one that is valid.")
    if status == 403:
        return ConfigError(f"the token ({where}) may not write to {name}", hint="Give it write access on the page of your access tokens.")
    said = getattr(error, "server_message", None) or _first_line(error)
    kind = ConfigError if status in SURELY_WRONG else SimpleTunerError
    return kind(f"the hub answered {status} for {name}: {said}", hint=None if kind is ConfigError else AGAIN)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
