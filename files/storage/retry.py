"""When a failed request is repeated, how long to wait before, and what the user is told."""

import os
import random
import re

from byolt.files.paths import without_secrets

CHANGED = ("changed while the run was reading it", "restore the object, or start again with the new data set")
_FINAL = {
    401: ("the credentials are not accepted", "check them"),
    403: ("access is denied", "check the credentials and the permissions on the bucket"),
    404: ("does not exist", "check the URL"),
    412: CHANGED,
}
_FINAL_TEXTS = (
    ("TooManyRedirects", "the server redirects in a circle", "check the URL"),
    (
        "following redirect|BadScheme",
        "the server redirects to a URL that is not read",
        "use the URL of the data",
    ),
    ("UnexpectedRange", "the server answers with other bytes than those asked for", "use another server"),
    (
        "CONTENT_RANGE|Content-Range",
        "the server does not state which bytes it sends (Content-Range)",
        "use another server",
    ),
    ("MissingContentLength", "the server does not state the object's size", "use another server"),
)
UNREACHABLE = (  # perhaps a mistyped URL
    "the host name cannot be resolved",
    "the connection is refused",
    "the server does not speak TLS, as https:// needs",
)
_KNOWN = (
    ("dns error|failed to lookup", UNREACHABLE[0]),
    ("ConnectionRefused|Connection refused", UNREACHABLE[1]),
    ("InvalidContentType", UNREACHABLE[2]),
    ("ConnectionReset|reset by peer", "the connection was reset"),
    ("IncompleteBody|UnexpectedEof|incomplete", "the body was cut short"),
    ("TimedOut|timed out|Timeout", "no answer in time"),
    ("certificate|InvalidCertificate", "the server's certificate is not accepted"),
)
_SECRETS = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


class RemoteError(OSError):
    """A request that failed for good: names the object, the cause and the remedy."""


class OutageError(RemoteError):
    """The server has not answered for as long as requests are repeated."""


class MissingError(RemoteError):
    """The object does not exist."""


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 50 ms, doubled up to 2 s, times a random 0.5 to 1."""
    return min(2.0, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1)


def final_cause(error: BaseException) -> tuple[str, str] | None:
    """Cause and remedy if repeating the request is of no use; None if it may succeed later."""
    text = str(error)
    if re.search("169\\.254\\.169\\.254|metadata\\.google|MetadataRequest|CredentialsNotLoaded", text):
        return (
            "no credentials were found",
            "set them, or AWS_SKIP_SIGNATURE=true (GOOGLE_, AZURE_) for public data: docs/remote.md",
        )
    if "Range request not supported" in text:
        return "the server does not answer range requests", "use another server, or copy the data"
    for pattern, words, remedy in _FINAL_TEXTS:
        if re.search(pattern, text):
            return words, remedy
    status = _status(text)
    if isinstance(error, FileNotFoundError):
        status = 404
    if status in _FINAL:
        cause, remedy = _FINAL[status]
        return f"{cause} (HTTP {status})", remedy
    if 300 <= status < 500 and status not in (408, 425, 429) and "RequestTimeout" not in text:
        return f"the request is refused (HTTP {status})", "check the URL, the region and the credentials"
    return None


def cause(error: BaseException) -> str:
    """A few words about an error; never the server's text, which may repeat what was sent."""
    text = str(error)
    if status := _status(text):
        return f"HTTP {status}"
    for pattern, words in _KNOWN:
        if re.search(pattern, text) or (words == "no answer in time" and isinstance(error, TimeoutError)):
            return words
    return _without_values(f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}")


def _without_values(text: str) -> str:
    """The text without the values of this process's secret environment variables, and without secrets in URLs."""
    for key, value in os.environ.items():
        if _SECRETS.search(key.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return without_secrets(text)


def _status(text: str) -> int:
    found = re.search(r"status(?: code)?: (\d{3})\b", text)
    return int(found[1]) if found else 0
