"""Files fetched over http and https into a folder: resumed where they broke off, whole or not there, bounded in bytes.

A file is written as `<name>.part`, beside `<name>.tag` with the server's mark of the version that is under way, and renamed when
it is whole. After a stop, however it came, the rest is asked for with `Range` and `If-Range`; a server whose file changed, or that
gives no mark, sends all of it again.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from simpletuner.data.backend import OpenBar
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import DatasetError, MemoryLimitError

THREADS = 16
CHUNK_BYTES = 1 << 18
WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may do better."""
OFTEN = 100
"""Tries that are worth it after a passing failure; `Fetching.tries` is what is made of it."""
LONGEST_WAIT_SECONDS = 30.0
USER_AGENT = "simpletuner (fetches the pictures of a list)"


@dataclass(frozen=True, slots=True)
class Fetching:
    """How files are fetched."""

    limit_bytes: int = LIMIT_BYTES
    """From so many on, a file is given up."""
    tries: int = 4
    wait_seconds: float = 1.0
    """Before the second try; doubled for each one after."""
    silence_seconds: float = 20.0
    """Without a byte, a connection has failed."""
    deadline_seconds: float = 600.0
    """For one try, however it trickles."""


class NotFetchedError(Exception):
    """A file did not come, or not all of it; the text says why, in few words that are the same for files of the same fate."""

    def __init__(self, reason: str, tries: int = 1, wait_seconds: float = 0.0) -> None:
        """
        Args:
            tries: after so many, another would hardly bring it.
            wait_seconds: what the server asks for, before the next.
        """
        super().__init__(reason)
        self.tries = tries
        self.wait_seconds = wait_seconds


class PartIsWrongError(NotFetchedError):
    """What was kept of an earlier try does not fit what the server has."""


def fetch_all(wanted: Sequence[tuple[str, Path]], how: Fetching, bar: OpenBar) -> dict[str, str]:
    """Fetch several files at once.

    Args:
        wanted: address and path of each file.
        how: bounds and patience.
        bar: opens a bar for so many files.

    Returns:
        Address to reason, of those that did not come.

    Raises:
        MemoryLimitError: the disk is full.
        DatasetError: a folder cannot be written.
    """
    failed: dict[str, str] = {}
    waiting, stop = iter(wanted), threading.Event()
    running: dict[Future[str | None], str] = {}
    with bar(len(wanted)) as open_bar, ThreadPoolExecutor(THREADS) as pool:
        try:
            while True:
                for url, path in islice(waiting, 4 * THREADS - len(running)):
                    running[pool.submit(outcome, url, path, how, stop)] = url
                if not running:
                    return failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    url, reason = running.pop(future), future.result()
                    open_bar.advance()
                    if reason is not None:
                        failed[url] = reason
        finally:
            stop.set()
            for future in running:
                future.cancel()


def outcome(url: str, path: Path, how: Fetching, stop: threading.Event) -> str | None:
    """Fetch a file, trying again as long as that may help; give the reason if it did not come."""
    reason = ""
    for number in range(how.tries):
        try:
            fetch(url, path, how, stop)
            return None
        except NotFetchedError as error:
            reason = str(error)
            if number + 1 >= min(error.tries, how.tries):
                break
            stop.wait(min(max(how.wait_seconds * 2**number, error.wait_seconds), LONGEST_WAIT_SECONDS))
        except OSError as error:  # of the disk; those of the network come as the other
            if error.errno == errno.ENOSPC:
                raise MemoryLimitError(f"the disk is full: {path.parent} takes no more files", hint="Free some space.") from error
            raise DatasetError(f"{path.parent} cannot be written: {error.strerror}", hint="Choose another csv_cache_dir.") from error
    return reason


def fetch(url: str, path: Path, how: Fetching, stop: threading.Event) -> None:
    """Try once to fetch a file, or the rest of it.

    Raises:
        NotFetchedError: it did not come, or not all of it; what came is kept for the next try.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.tag")
    mark = tag.read_text(encoding="latin-1") if tag.exists() and part.exists() else ""
    begun = part.stat().st_size if mark else 0
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
    if begun:
        headers |= {"Range": f"bytes={begun}-", "If-Range": mark}
    with forgotten_if_wrong(part), opened(url, headers, how) as answer:
        begun, total = place_in_file(answer, begun)
        if total is not None and total >= how.limit_bytes:
            raise NotFetchedError(f"{how.limit_bytes:,} bytes or more")
        if not begun:
            # The mark goes first: a part without one is begun anew, a part with a wrong one would become a mixture.
            part.unlink(missing_ok=True)
            tag.write_text(mark_of(answer), encoding="latin-1", errors="replace")
        with part.open("ab") as file:
            append(file, chunks(answer, how, stop), begun, total, how)
    os.replace(part, path)
    tag.unlink(missing_ok=True)


@contextmanager
def forgotten_if_wrong(part: Path) -> Iterator[None]:
    try:
        yield
    except PartIsWrongError:
        part.unlink(missing_ok=True)
        raise


def append(file: IO[bytes], data: Iterator[bytes], begun: int, total: int | None, how: Fetching) -> None:
    """Write what comes behind the `begun` bytes that a file has, and make sure that it is all."""
    for chunk in data:
        begun += len(chunk)
        if begun >= how.limit_bytes:
            file.truncate(0)
            raise NotFetchedError(f"{how.limit_bytes:,} bytes or more")
        file.write(chunk)
    if total is not None and begun != total:
        raise NotFetchedError("the connection broke off", OFTEN)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def opened(url: str, headers: dict[str, str], how: Fetching) -> Iterator[http.client.HTTPResponse]:
    """Ask for a file; whatever prevents an answer is a NotFetchedError."""
    try:
        request = urllib.request.Request(plain_ascii(url), headers=headers)
        answer = opener().open(request, timeout=how.silence_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and "Range" in headers:
            raise PartIsWrongError("the server does not have the rest", OFTEN) from None
        after = error.headers.get("Retry-After", "")
        raise NotFetchedError(
            f"the server answers {error.code} {http.client.responses.get(error.code, '')}".rstrip(),
            tries=OFTEN if error.code in WORTH_ANOTHER_TRY else 1,
            wait_seconds=float(after) if after.isdigit() else 0,
        ) from None
    except TimeoutError:
        raise silent(how) from None
    except urllib.error.URLError as error:
        raise no_connection(error.reason) from None
    except (http.client.RemoteDisconnected, ConnectionError):
        raise NotFetchedError("the connection broke off", OFTEN) from None
    except (http.client.HTTPException, ValueError):
        raise NotFetchedError("the address or the answer is not well formed") from None
    with answer:
        yield answer


def chunks(answer: http.client.HTTPResponse, how: Fetching, stop: threading.Event) -> Iterator[bytes]:
    """Give an answer in pieces, until it ends, fails, or the run is stopped."""
    end = time.monotonic() + how.deadline_seconds
    while True:
        try:
            chunk = answer.read1(CHUNK_BYTES)
        except TimeoutError:
            raise silent(how) from None
        except (http.client.HTTPException, OSError):
            raise NotFetchedError("the connection broke off", OFTEN) from None
        if not chunk:
            return
        yield chunk
        if stop.is_set():
            raise NotFetchedError("the run was stopped")
        if time.monotonic() > end:
            raise NotFetchedError(f"not whole after {how.deadline_seconds:g} s", OFTEN)


def silent(how: Fetching) -> NotFetchedError:
    return NotFetchedError(f"no answer for {how.silence_seconds:g} s", OFTEN)


def no_connection(reason: object) -> NotFetchedError:
    """Why there was none. Tried once more at most: of a long list, many hosts are gone for good."""
    if isinstance(reason, socket.gaierror):
        return NotFetchedError("the host is not known")
    if isinstance(reason, TimeoutError):
        return NotFetchedError("the host does not answer", tries=2)
    if isinstance(reason, ConnectionRefusedError):
        return NotFetchedError("the host refuses the connection", tries=2)
    return NotFetchedError(reason if isinstance(reason, str) else f"no connection ({type(reason).__name__})", tries=2)


def place_in_file(answer: http.client.HTTPResponse, begun: int) -> tuple[int, int | None]:
    """At which byte of the file an answer begins, and how many bytes the file has, if the server says."""
    length = answer.headers.get("Content-Length", "")
    if answer.status != HTTPStatus.PARTIAL_CONTENT:
        return 0, int(length) if length.isdigit() else None
    span, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if span.split("-")[0] != str(begun):
        raise PartIsWrongError("the server sends another part than was asked for", OFTEN)
    return begun, int(total) if total.isdigit() else None


def mark_of(answer: http.client.HTTPResponse) -> str:
    """What tells this version of a file from others, or nothing. A weak ETag does not promise the same bytes."""
    tag = str(answer.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(answer.headers.get("Last-Modified", ""))


def plain_ascii(url: str) -> str:
    """Write an address as servers want it: international names and letters encoded, what is encoded already left alone."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    safe = "%/:=&?~+!$,;'@()*[]"
    return parts._replace(netloc=host, path=quote(parts.path, safe), query=quote(parts.query, safe), fragment="").geturl()


@lru_cache(maxsize=1)  # the certificates are read once, not for each file
def opener() -> urllib.request.OpenerDirector:
    """What opens addresses: http and https alone, so that no redirect leads to a file of this machine."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        GuardedRedirects(),
    ):
        director.add_handler(handler)
    return director


class GuardedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from the open network into a private one."""

    max_redirections = 5

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # or all of its page would be read, however long
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise NotFetchedError("it redirects to something else than http or https")
        if is_private(newurl) and not is_private(req.full_url):
            raise NotFetchedError("it redirects to a private address")
        return super().redirect_request(req, fp, code, msg, headers, plain_ascii(newurl))


def is_private(url: str) -> bool:
    """Whether an address leads to this machine or a network of its own, as far as its name tells now."""
    host = urlsplit(url).hostname or ""
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError):  # unknown here: behind a proxy, or nowhere
        return False
    return any(not ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_global for entry in found)
