"""Classification of network failures as transient or permanent, and messages for the permanent ones.

Exceptions are matched by class name, so that no client library needs to be installed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from cnn2gnn_dist.errors import UserError

_TRANSIENT = {
    "ClientConnectionError",  # aiohttp: reset, refused, no route, timed out
    "ClientPayloadError",  # aiohttp: truncated body
    "ConnectionError",  # Python and botocore
    "EOFError",
    "HTTPClientError",  # botocore: timed out, closed, interrupted
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",  # botocore, for a busy server's error page
    "TimeoutError",
}
_PERMANENT = {"ClientSSLError", "SSLError", "ClientConnectorCertificateError"}
_TRANSIENT_STATUS = {408, 425, 429}
_TRANSIENT_NUMBERS = {
    errno.EIO,  # s3fs, for a status without a specific exception
    getattr(errno, "EREMOTEIO", errno.EIO),
    errno.EBUSY,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may help: timeouts, 5xx, broken connections, truncated bodies."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if names & _PERMANENT:
        return False
    if names & _TRANSIENT:
        return True
    return any(isinstance(e, OSError) and e.errno in _TRANSIENT_NUMBERS for e in _causes(error))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, if there is one."""
    for cause in _causes(error):
        status = getattr(cause, "status", None)  # aiohttp
        response = getattr(cause, "response", None)  # botocore
        if status is None and isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int) and status >= 300:
            return status
    return None


def refused(url: str, error: BaseException, done: str = "read") -> UserError:
    """Return the error for a permanent failure; ``done``: what was tried."""
    status = status_of(error)
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    number = "" if status is None else f" ({status})"
    if "TooManyRedirects" in names:  # aiohttp; fsspec reports it as a file that is not found
        return UserError(
            f"the file can't be {done}: the server redirects in a loop, or too often",
            where=url,
            remedy="check the URL (http or https, where it leads in a browser), or ask whoever runs the server",
        )
    if status in (404, 410) or (status is None and "FileNotFoundError" in names):
        return UserError(
            f"the file can't be {done}: it does not exist{number}",
            where=url,
            remedy="check the URL and the bucket",
        )
    if status in (401, 403) or names & {"PermissionError", "NoCredentialsError"}:
        return UserError(
            f"the file can't be {done}: permission denied{number}: {brief(error)}",
            where=url,
            remedy="set credentials in the protocol's usual environment (AWS_*, ~/.aws, "
            "~/.netrc) or fsspec's configuration (~/.config/fsspec, FSSPEC_S3_ANON=true for public "
            "buckets)",
        )
    if status == 416:
        return UserError(
            "the file can't be read: it is shorter than it was (416)",
            where=url,
            remedy="index the shards again",
        )
    return UserError(
        f"the file can't be {done}: {brief(error)}",
        where=url,
        remedy="check the URL and fsspec's configuration (~/.config/fsspec)",
    )


def gave_up(url: str, error: BaseException, seconds: float, done: str = "read") -> UserError:
    """Return the error after the last retry."""
    return UserError(
        f"the file can't be {done} after {seconds:.0f} s of retries; the last error: {brief(error)}",
        where=url,
        remedy="check the server and the network, then start again: finished work is kept",
    )


def unknown(url: str, error: Exception) -> UserError:
    """Return the error for a URL that has no file system."""
    if isinstance(error, ImportError):
        remedy = "for s3, pip install 'cnn2gnn-dist[remote]'; for others, install the package named above"
    else:
        remedy = "use file, http, https, s3 or any other protocol that fsspec supports"
    return UserError(f"this URL can't be opened: {error}", where=url, remedy=remedy)


def brief(error: BaseException) -> str:
    """Format an error in one line."""
    status = status_of(error)
    if status is not None:
        return f"status {status}"
    root = list(_causes(error))[-1]
    text = " ".join(str(root).split())[:160]
    return f"{type(root).__name__}: {text}" if text else type(root).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__
