"""Downloads that go on where they stopped.

torch.hub and pooch would start over, and mix a file with one that has changed
on the server since.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.error import HTTPError, URLError

CHUNK = 1 << 18
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_ALGORITHMS = {32: 'md5', 40: 'sha1', 64: 'sha256'}

#: Called with the bytes there are and the bytes there will be (0 if the
#: server does not say); the first call is what an earlier run left.
Progress = Callable[[int, int], None]


class DownloadError(RuntimeError):
    """A download failed; the message says what to do."""


class _ChangedError(Exception):
    """The file on the server is not the one the partial file is of."""


def download(
    url: str,
    target: Path,
    checksum: str | None = None,
    progress: Progress = lambda done, total: None,
    before: Callable[[int], None] = lambda rest: None,
    retries: int = 3,
    timeout: float = 30,
    wait: float = 2,
) -> None:
    """Download a file, or go on with what an earlier call left of it.

    What has arrived is kept in ``target.partial``, with the server's version
    of the file in ``target.partial.json``; both go when the file is whole. A
    server that cannot send a part of a file, or whose file has changed since,
    makes it start over.

    Args:
        url (str): An http(s) address.
        target (Path): File to write. Its folder is created.
        checksum (str, optional): MD5, SHA-1 or SHA-256 in hexadecimal, told
            apart by their length.
        progress (Callable): Called after every chunk.
        before (Callable): Called with the bytes that are still to
            come before they do, for example to check the disk.
        retries (int): How often to go on by itself after the connection
            broke without a byte. Defaults to 3.
        timeout (float): Seconds without data until it is broken. Defaults to
            30.
        wait (float): Seconds to wait before going on. Defaults to 2.

    Raises:
        DownloadError: If the server cannot be reached, refuses, breaks off
            too often, or what arrived is not the file.
        ValueError: If the checksum is no checksum.
    """
    if checksum:
        _digest(checksum)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, note = partial_files(target)
    failures = 0
    while True:
        had = _size(partial)
        try:
            _attempt(url, partial, note, progress, before, timeout)
            break
        except _ChangedError:
            partial.unlink(missing_ok=True)
            continue
        except HTTPError as error:
            raise DownloadError(
                f'{url}: the server says {error.code} {error.reason}; is the '
                'address right?'
            ) from None
        except (URLError, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise DownloadError(
                    f'Cannot write {partial}: {error.strerror}'
                ) from None
            failures = 0 if _size(partial) > had else failures + 1
            if failures > retries:
                reason = getattr(error, 'reason', error)
                kept = _size(partial)
                raise DownloadError(
                    f'Cannot download {url}: {reason}.\n'
                    + (
                        f'{kept / 1e6:.1f} MB are kept in {partial}; run '
                        'the command again to go on.'
                        if kept
                        else 'Check the network and the address.'
                    )
                ) from None
            time.sleep(wait)
    if checksum:
        try:
            verify(partial, checksum)
        except DownloadError:
            partial.unlink()
            note.unlink()
            raise
    os.replace(partial, target)
    note.unlink(missing_ok=True)


def partial_files(target: Path) -> tuple[Path, Path]:
    """Where an unfinished download is kept, and what it is of."""
    return (
        target.with_name(f'{target.name}.partial'),
        target.with_name(f'{target.name}.partial.json'),
    )


def verify(path: Path, checksum: str) -> None:
    """Compare a file with its checksum.

    Raises:
        DownloadError: If it is another one.
    """
    digest = _digest(checksum)
    with path.open('rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != checksum.lower():
        raise DownloadError(
            f'{path} has the {digest.name.upper()} {digest.hexdigest()}, '
            f'expected {checksum.lower()}: it is damaged or another file. '
            'Delete it and download it again.'
        )


def _digest(checksum: str) -> hashlib._Hash:
    name = _ALGORITHMS.get(len(checksum))
    if name is None or not re.fullmatch('[0-9a-fA-F]+', checksum):
        raise ValueError(
            f'{checksum!r} is no checksum: expected 32 (MD5), 40 (SHA-1) or '
            '64 (SHA-256) hexadecimal digits'
        )
    return hashlib.new(name, usedforsecurity=False)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version(headers: Mapping[str, str]) -> dict[str, str]:
    """What tells one version of a file from another."""
    names = 'ETag', 'Last-Modified'
    return {name: headers[name] for name in names if headers.get(name)}


def _attempt(
    url: str,
    partial: Path,
    note: Path,
    progress: Progress,
    before: Callable[[int], None],
    timeout: float,
) -> None:
    """One connection; returns when all is there."""
    have, known = _size(partial), {}
    if have:
        try:
            known = json.loads(note.read_text())
        except (OSError, ValueError):
            raise _ChangedError from None
        if known.get('url') != url:
            raise _ChangedError
    total = known.get('total', 0)
    request = urllib.request.Request(url, headers=_headers(have, known))
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing is left to send: all of it is there, or too much.
        if not total or have != total:
            raise _ChangedError from None
        progress(have, total)
        return
    with response:
        version = _version(response.headers)
        length = int(response.headers.get('Content-Length') or 0)
        if response.status == 206 and have:
            given = response.headers.get('Content-Range', '')
            same = version == known.get('version')
            if not same or not re.fullmatch(
                rf'bytes {have}-\d+/{total}', given
            ):
                raise _ChangedError
        else:
            have, total = 0, length  # the whole file, whatever was asked for
        before(length)
        content = dict(url=url, total=total, version=version)
        note.write_text(json.dumps(content))
        with partial.open('ab' if have else 'wb') as file:
            progress(have, total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
    if have < total:
        raise ConnectionError(f'the connection broke after {have} bytes')


def _headers(have: int, known: dict) -> dict[str, str]:
    headers = {'User-Agent': 'pm_seg', 'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
        version = known.get('version', {})
        etag = version.get('ETag', 'W/')
        unchanged = version.get('Last-Modified')
        if not etag.startswith('W/'):
            unchanged = etag
        if unchanged:
            headers['If-Range'] = unchanged
    return headers
