"""What `webhook_config` may hold: who is told of a run over the network, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from simpletuner.errors import ConfigError, choose
from simpletuner.relaxed_json import load_relaxed

LEVELS = ("debug", "info", "warning", "error", "critical")
"""How much something matters, the least first."""
URLS = {"discord": "webhook_url", "raw": "callback_url"}
"""The kinds, and the key of each under which its address stands."""
COMMON = ("webhook_type", "message_prefix", "log_level")
OWN = {"discord": ("webhook_url",), "raw": ("callback_url", "auth_token", "ssl_no_verify")}
SPELLINGS = {"type": "webhook_type"}


@dataclass(frozen=True, slots=True)
class Webhook:
    """One address that is told of a run. What is secret in it is in no text that it makes of itself."""

    kind: Literal["discord", "raw"]
    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """Sent as X-API-Key."""
    verifies: bool = True
    """Whether the receiver's certificate must be one that this machine trusts."""
    prefix: str = ""
    level: str = "info"
    """What matters less is not sent."""

    @property
    def name(self) -> str:
        """What may be said of it: the kind and the host, since Discord's addresses are secrets as a whole."""
        return f"{self.kind} {urlsplit(self.url).hostname}"


def read_webhooks(value: Any) -> tuple[tuple[Webhook, ...], tuple[str, ...]]:
    """Read an object, a list of them, or the file that holds either.

    Returns:
        The webhooks, and everything that is wrong; what is wrong tells no addresses and no tokens.
    """
    where = "webhook_config"
    if isinstance(value, (str, Path)):
        if str(value).startswith(("http:", "https:")):
            return (), (f'{where} is an address: write {{"webhook_type": "discord", "webhook_url": "..."}}, or raw and callback_url',)
        where = f"webhook_config {value}"
        try:
            value = load_relaxed(Path(value))
        except ConfigError as error:
            return (), (f"webhook_config: {error.message}",)
    entries = value if isinstance(value, list) else [value] if value is not None else []
    found: list[Webhook] = []
    problems: list[str] = []
    for number, entry in enumerate(entries, start=1):
        read, wrong = _read_one(entry, f"{where}, entry {number}" if len(entries) > 1 else where)
        problems += wrong
        found += [read] if read else []
    return tuple(found), tuple(problems)


def _read_one(entry: Any, where: str) -> tuple[Webhook | None, Sequence[str]]:
    if not isinstance(entry, Mapping):
        return None, [f'{where} is no object: it is {{"webhook_type": "raw", "callback_url": "..."}}, for example']
    given = {SPELLINGS.get(key, key): value for key, value in entry.items() if not str(key).startswith("_") and value is not None}
    kind = given.get("webhook_type")
    if kind not in URLS:
        what = "has no webhook_type" if kind is None else f"has webhook_type {kind!r}"
        return None, [f"{where} {what}; {choose(str(kind), URLS, 'types')}"]
    known = (*COMMON, *OWN[kind])
    wrong = [f"{where}: {key} is no key of webhook_type {kind}; {choose(str(key), known, 'keys')}" for key in given if key not in known]
    url, level, token, skips = given.get(URLS[kind]), given.get("log_level", "info"), given.get("auth_token"), given.get("ssl_no_verify", False)
    wrong += [f"{where}: {URLS[kind]} {problem}" for problem in [_address_problem(url)] if problem]
    if level not in LEVELS:
        wrong.append(f"{where}: log_level {level!r} is none; {choose(str(level), LEVELS, 'levels')}")
    if not isinstance(skips, bool):
        wrong.append(f"{where}: ssl_no_verify {skips!r} is not true or false")
    if token is not None and (not isinstance(token, str) or not token.isascii() or not token.isprintable() or token != token.strip() or not token):
        wrong.append(f"{where}: auth_token must be a text of plain letters, digits and signs, without spaces around it")
    if not isinstance(given.get("message_prefix", ""), str):
        wrong.append(f"{where}: message_prefix is not a text")
    if wrong:
        return None, wrong
    return Webhook(cast(Any, kind), str(url), token, not skips, given.get("message_prefix", ""), str(level)), []


def _address_problem(url: Any) -> str | None:
    """What keeps a text from being an address; it may be secret, so that it is not quoted."""
    if url is None:
        return "is not set"
    if not isinstance(url, str) or any(letter.isspace() for letter in url):
        return "is no address such as https://example.com/hook"
    if "{" in url:
        return "holds {...}: {env:NAME} is replaced in config.json alone, if that variable is set, and in no other file"
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    return None if is_whole else "is no address such as https://example.com/hook"
