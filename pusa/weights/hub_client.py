"""Ask a model hub that is not trusted: every answer is bounded in length and in time.

The requests are made by huggingface_hub's HTTP client, with its token and its settings. The bodies of refusals and of
redirects are not read.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session

from pusa.errors import WeightsError
from pusa.system.files import parse_json
from pusa.system.text import printable
from pusa.system.threads import DaemonThreadPool

_TEMPORARY_STATUS = {408, 429, 500, 502, 503, 504}
_MOST_REDIRECTS = 10
LONGEST_JSON = 16 << 20  # bytes of an answer; a list has about 300 for each file
_HEAD_PATIENCE = 60.0  # seconds in which the head of an answer must arrive
_PATIENCE, _SLOWEST = 60.0, 1000.0  # seconds, and the bytes per second that must arrive in each such time


class HubUnreachable(WeightsError):
    """The hub gave no usable answer; a later request may succeed. Until then the cache can be used."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait  # the seconds that the hub asks to wait


def read_json(page: str, revision: str | None, url: str, kind: type) -> tuple[Any, int, str | None]:
    """Return the JSON value that the hub answers with, its bytes, and the address of the next page if there is one.

    Args:
        page: the repository's address on the hub, for messages.
        revision: the revision that is asked for, for messages; None: main.
        url: the address to ask.
        kind: the type of value that is expected.

    Raises:
        WeightsError: the hub refuses, cannot be reached, or answers with something else.
    """
    with open_answer(page, revision, url) as response:
        body = b"".join(pieces(response, LONGEST_JSON, "the hub's list of files"))
        link = re.search(r'<([^<>]*)>\s*;\s*rel="next"', response.headers.get("Link", ""))
    value = parse_json(body)
    if not isinstance(value, kind):
        raise not_a_hub()
    return value, len(body), link[1] if link else None


@contextmanager
def open_answer(page: str, revision: str | None, url: str, start: int = 0) -> Iterator[Any]:
    """Yield the answer to a GET from byte `start` on, after redirects; its body is not read yet.

    Args and errors: as `read_json`.
    """
    _require_address(constants.ENDPOINT)
    client = get_session()
    # A compressed answer could be far larger than what arrives.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        request = client.build_request("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        # The client itself would read the body of each redirect, however long.
        for _ in range(_MOST_REDIRECTS + 1):
            response = _send(client, request)
            try:
                if response.next_request is None:
                    _require_success(response, page, revision)
                    yield response
                    return
            finally:
                response.close()
            secure, request = request.url.scheme == "https", response.next_request
            if request.url.scheme not in (("https",) if secure else ("http", "https")):
                raise WeightsError(f"the hub redirects to {printable(request.url, 100)}; expected https")
        raise WeightsError(f"the hub redirects more than {_MOST_REDIRECTS} times")
    except hub_errors.OfflineModeIsEnabled as error:
        raise HubUnreachable("HF_HUB_OFFLINE=1 forbids requests to the hub; unset it to download") from error
    except hub_errors.HTTPError as error:
        reason = printable(error) or type(error).__name__
        raise HubUnreachable(
            f"the connection to the hub {constants.ENDPOINT} broke ({reason}); run the same command again"
        ) from error


def _send(client: Any, request: Any) -> Any:
    """Return the head of an answer. A thread waits for it: the client's time limit holds for each byte, not for all."""
    pool = DaemonThreadPool(1)
    answer = pool.submit(lambda: client.send(request, stream=True, follow_redirects=False))
    try:
        return answer.result(timeout=_HEAD_PATIENCE)
    except TimeoutError as error:
        answer.add_done_callback(lambda late: None if late.exception() else late.result().close())
        message = f"an answer of the hub {constants.ENDPOINT} arrives too slowly; run the same command again later"
        raise HubUnreachable(message) from error
    finally:
        pool.close()


def _require_success(response: Any, page: str, revision: str | None) -> None:
    status, code = response.status_code, response.headers.get("X-Error-Code")
    hub, token = constants.ENDPOINT, "HF_TOKEN or `hf auth login`"
    if status in (200, 206):
        return
    if code == "GatedRepo":
        raise WeightsError(f"the repository is gated; ask for access at {page}, then give your token by {token}")
    if code == "RevisionNotFound":
        revision = revision or "main"
        raise WeightsError(f"{page} has no revision {revision!r}; expected a branch, a tag or a commit")
    if status in (401, 403, 404):
        raise WeightsError(
            f"{hub} has no such repository, or it is private; check the name, or give a token by {token}"
        )
    # The phrase that the server sends is not shown.
    phrase = f" {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else ""
    kind = HubUnreachable if status in _TEMPORARY_STATUS else WeightsError
    error = kind(f"the hub {hub} answered {status}{phrase}; run the same command again later")
    if isinstance(error, HubUnreachable):
        limit = re.search(r"\bt=(\d{1,9})\b", response.headers.get("RateLimit", ""))
        after = limit or re.fullmatch(r"(\d{1,9})", response.headers.get("Retry-After", ""))
        error.wait = float(after[1]) if after else 0.0
    raise error


def _require_address(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not (valid and endpoint.isascii() and endpoint.isprintable()):
        raise WeightsError(f"HF_ENDPOINT is {endpoint!r:.200}; expected the address of a hub, such as https://host")


def not_a_hub() -> HubUnreachable:
    """Return the error for an answer that no hub gives."""
    hub = constants.ENDPOINT
    return HubUnreachable(f"the server at {hub} does not answer as a model hub; check HF_ENDPOINT and the proxy")


def pieces(response: Any, most: int, what: str) -> Iterator[bytes]:
    """Yield the body of an answer as it arrives.

    Raises:
        WeightsError: it is compressed, has more than `most` bytes, or arrives too slowly to ever end.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise WeightsError(f"the hub compresses {what}, which was not asked for")
    count, since, before = 0, time.monotonic(), 0
    for piece in response.iter_raw():
        count += len(piece)
        if count > most:
            raise WeightsError(f"the hub sends more than the {most:,} bytes that are expected of {what}")
        yield piece
        if (waited := time.monotonic() - since) > _PATIENCE:
            if count - before < waited * _SLOWEST:
                raise HubUnreachable(f"{what} arrives too slowly; run the same command again later")
            since, before = since + waited, count
