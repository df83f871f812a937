"""Downloads from a server of our own, with what can go wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from servers import FileServer

from pm_seg.utils.download import DownloadError, download, partial_files

DATA = bytes(range(256)) * 4000  # 1 MB: several chunks
URL = '/some/file.zip'


@pytest.fixture
def server():
    with FileServer(DATA) as server:
        yield server


def get(server: FileServer, target: Path, **options) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    download(
        server.url + URL,
        target,
        progress=lambda *step: seen.append(step),
        wait=0,
        timeout=5,
        **options,
    )
    return seen


def stop_half_way(server: FileServer, target: Path) -> int:
    """Interrupt a download; returns what is there of it."""

    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url + URL, target, progress=progress)
    assert not target.exists()
    have = partial_files(target)[0].stat().st_size
    assert len(DATA) // 2 < have < len(DATA)
    return have


def test_whole_file(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / 'new' / 'file.zip'
    seen = get(server, target)
    assert target.read_bytes() == DATA
    assert seen[0] == (0, len(DATA)) and seen[-1] == (len(DATA), len(DATA))
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize('name', ['md5', 'sha1', 'sha256'])
def test_checksums(server: FileServer, tmp_path: Path, name: str) -> None:
    good = hashlib.new(name, DATA).hexdigest()
    get(server, tmp_path / 'a', checksum=good.upper())
    with pytest.raises(DownloadError, match='damaged or another file'):
        get(server, tmp_path / 'b', checksum='0' * len(good))
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_no_checksum(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='hexadecimal'):
        get(server, tmp_path / 'a', checksum='abc')
    assert not server.requests


def test_goes_on_after_an_interruption(server, tmp_path: Path) -> None:
    target = tmp_path / 'file.zip'
    have = stop_half_way(server, target)
    rest: list[int] = []
    seen = get(server, target, before=rest.append)
    assert seen[0] == (have, len(DATA)) and rest == [len(DATA) - have]
    assert server.requests[-1]['Range'] == f'bytes={have}-'
    assert server.sent[-1] == len(DATA) - have
    assert target.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [target]


def test_server_without_ranges_starts_over(server, tmp_path: Path) -> None:
    server.ranges = False
    stop_half_way(server, tmp_path / 'file')
    seen = get(server, tmp_path / 'file')
    assert seen[0] == (0, len(DATA))
    assert (tmp_path / 'file').read_bytes() == DATA


@pytest.mark.parametrize('honours_if_range', [True, False])
@pytest.mark.parametrize('grows', [True, False])
def test_a_changed_file_is_not_mixed(
    server: FileServer, tmp_path: Path, honours_if_range: bool, grows: bool
) -> None:
    server.if_range = honours_if_range
    stop_half_way(server, tmp_path / 'file')
    server.data = DATA[::-1] + b'more' * grows
    get(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == server.data


def test_a_shorter_file(server: FileServer, tmp_path: Path) -> None:
    """The server has nothing at the place to go on from: error 416."""
    server.if_range = False
    stop_half_way(server, tmp_path / 'file')
    server.data = b'short'
    get(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == b'short'


def test_killed_before_renaming(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / 'file'
    stop_half_way(server, target)
    partial_files(target)[0].write_bytes(DATA)
    get(server, target)
    assert target.read_bytes() == DATA and server.sent[-1] == 0


def test_partial_file_of_another_address(server, tmp_path: Path) -> None:
    target = tmp_path / 'file'
    stop_half_way(server, target)
    download(f'{server.url}/other.zip', target)
    assert 'Range' not in server.requests[-1]
    assert target.read_bytes() == DATA


def test_broken_connections(server: FileServer, tmp_path: Path) -> None:
    """Each breaks after 300 kB; it goes on by itself until all is there."""
    server.breaks_after = 300_000
    get(server, tmp_path / 'file', retries=0)
    assert (tmp_path / 'file').read_bytes() == DATA
    assert len(server.requests) == 4


def test_gives_up_and_keeps_what_came(server, tmp_path: Path) -> None:
    have = stop_half_way(server, tmp_path / 'file')
    server.breaks_after = 0
    with pytest.raises(DownloadError, match='run the command again to go on'):
        get(server, tmp_path / 'file', retries=2)
    assert partial_files(tmp_path / 'file')[0].stat().st_size == have
    assert len(server.requests) == 1 + 3


def test_not_there(server: FileServer, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DownloadError, match='the server says 404'):
        get(server, tmp_path / 'file')
    with pytest.raises(DownloadError, match='Check the network'):
        download('http://127.0.0.1:9/x', tmp_path / 'file', retries=0, wait=0)
    assert not list(tmp_path.iterdir())


def test_full_disk(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'open', full)
    with pytest.raises(DownloadError, match='No space left'):
        get(server, tmp_path / 'file')
    assert len(server.requests) == 1
