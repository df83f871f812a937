"""ADE20K from a server of our own, a small zip of the same layout."""

from __future__ import annotations

import hashlib
import io
import random
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from servers import FileServer

from pm_seg.cli import prepare_ade20k
from pm_seg.cli.prepare_ade20k import FOLDER, check_layout, main, unpack

COUNTS = {'training': 3, 'validation': 2}


def small_zip(*extra: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f'{FOLDER}/sceneCategories.txt', 'a b')
        for part, count in COUNTS.items():
            for i in range(count):
                name = f'{part}/ADE_{part}_{i:08d}'
                archive.writestr(f'{FOLDER}/images/{name}.jpg', b'jpg')
                archive.writestr(f'{FOLDER}/annotations/{name}.png', b'png')
        for name, content in extra:
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(prepare_ade20k, 'COUNTS', COUNTS)


@pytest.fixture
def server():
    with FileServer(small_zip()) as server:
        yield server


def code_and_message(*arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    code = error.value.code
    return (code, '') if isinstance(code, int) else (1, code)


def test_download_unpack_check(server, tmp_path: Path, capsys) -> None:
    root = tmp_path / 'ade'
    checksum = hashlib.sha1(server.data).hexdigest()
    options = ['--url', f'{server.url}/ade.zip', '--checksum', checksum]
    main([str(root), *options])
    out = capsys.readouterr()
    assert 'Downloading' in out.err and 'Unpacking' in out.err
    assert f'data_root={root / FOLDER}' in out.out
    assert check_layout(root / FOLDER, COUNTS) == ''
    names = sorted(path.name for path in root.iterdir())
    assert names == [FOLDER, f'{FOLDER}.zip']

    main([str(root), *options])  # nothing left to do
    assert len(server.requests) == 1
    assert '3 training and 2 validation' in capsys.readouterr().out
    main(['--check', str(root / FOLDER)])

    (root / FOLDER / 'images/training/ADE_training_00000001.jpg').unlink()
    code, message = code_and_message(root, *options)
    assert code == 1 and '--overwrite' in message
    main([str(root), *options, '--overwrite', '--delete-zip'])
    assert len(server.requests) == 1, 'the zip was there'
    assert [path.name for path in root.iterdir()] == [FOLDER]
    assert check_layout(root / FOLDER, COUNTS) == ''


def test_a_zip_you_have(tmp_path: Path) -> None:
    path = tmp_path / 'mine.zip'
    path.write_bytes(small_zip())
    code, message = code_and_message(tmp_path / 'a', '--zip', path)
    assert code == 1 and 'expected 219e1696' in message
    main([str(tmp_path / 'a'), '--zip', str(path), '--checksum', 'none'])
    assert check_layout(tmp_path / 'a' / FOLDER, COUNTS) == ''
    code, message = code_and_message(tmp_path / 'b', '--zip', 'nothing.zip')
    assert code == 1 and 'no such file' in message


def test_wrong_usage(tmp_path: Path, capsys) -> None:
    assert code_and_message(tmp_path, '--checksum', 'x')[0] == 2
    assert 'hexadecimal' in capsys.readouterr().err
    assert code_and_message('--nonsense')[0] == 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    root = tmp_path / FOLDER
    assert check_layout(root, COUNTS).endswith('does not exist')
    with zipfile.ZipFile(io.BytesIO(small_zip())) as archive:
        archive.extractall(tmp_path)
    assert 'one folder too high' in check_layout(tmp_path, COUNTS)
    images = root / 'images/training'
    (images / 'ADE_training_00000000.jpg').rename(images / 'other.jpg')
    message = check_layout(root, COUNTS)
    assert 'training: no annotation for other' in message
    assert 'training: no picture for ADE_training_00000000' in message
    (images / 'other.jpg').unlink()
    (images / 'ADE_training_00000002.jpg').write_bytes(b'')
    for path in (root / 'annotations/validation').iterdir():
        path.unlink()
    (root / 'annotations/validation').rmdir()
    message = check_layout(root, COUNTS)
    assert 'images/training: 2 *.jpg files, expected 3' in message
    assert 'ADE_training_00000002.jpg have no content' in message
    assert 'annotations/validation: there is no such folder' in message
    code, message = code_and_message('--check', root)
    assert code == 1 and 'prepare_ade20k.py' in message


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f'{FOLDER}/link')
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    'name',
    ['../evil', '/evil', f'{FOLDER}/../../evil', '..\\evil', 'C:/e', link()],
    ids=str,
)
def test_paths_that_lead_out(name, tmp_path: Path) -> None:
    path = tmp_path / 'a.zip'
    path.write_bytes(small_zip((name, b'x')))
    with pytest.raises(SystemExit, match='not safe to unpack'):
        unpack(path, tmp_path / FOLDER, COUNTS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('where', ['cut', 'flipped', 'html'])
def test_damaged_zip(where: str, tmp_path: Path) -> None:
    data = bytearray(small_zip((f'{FOLDER}/big', b'\0\1' * 9999)))
    if where == 'flipped':
        start = data.index(b'big') + 10
        data[start : start + 8] = b'\xff' * 8
    data = {'cut': data[:-200], 'html': b'<html>'}.get(where, data)
    path = tmp_path / 'a.zip'
    path.write_bytes(data)
    with pytest.raises(SystemExit, match='is damaged or no zip'):
        unpack(path, tmp_path / FOLDER, COUNTS)
    assert list(tmp_path.iterdir()) == [path]


def test_another_dataset_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / 'a.zip'
    path.write_bytes(small_zip())
    target = tmp_path / FOLDER
    target.mkdir()
    (target / 'old').touch()
    with pytest.raises(SystemExit) as error:
        unpack(path, target, {'training': 4, 'validation': 2})
    assert f'{FOLDER} is not whole' in str(error.value)
    assert 'images/training: 3 *.jpg files, expected 4' in str(error.value)
    assert (target / 'old').exists() and len(list(tmp_path.iterdir())) == 2


def test_full_disk(server, tmp_path: Path, monkeypatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr('shutil.disk_usage', lambda _: Usage)
    code, message = code_and_message(tmp_path, '--url', server.url)
    assert code == 1 and 'are free' in message and str(tmp_path) in message
    assert not list(tmp_path.iterdir())


def test_server_down(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, 'sleep', lambda _: None)
    code, message = code_and_message(tmp_path, '--url', 'http://127.0.0.1:9/')
    assert code == 1 and 'Check the network' in message


def test_interrupted_and_gone_on(tmp_path: Path, capsys) -> None:
    """Ctrl-C in a process of its own: one line, and a file to go on with."""
    noise = random.Random(0).randbytes(4 << 20)
    data = small_zip((f'{FOLDER}/noise', noise))
    with FileServer(data) as server:
        server.delay = 0.3
        process = subprocess.Popen(
            [
                sys.executable, ROOT / 'tools/prepare_ade20k.py', tmp_path,
                '--url', f'{server.url}/a.zip',
            ],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        partial = tmp_path / f'{FOLDER}.zip.partial'
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 130
        assert 'Traceback' not in error
        assert error.strip().endswith('what was downloaded is kept.')
        have = partial.stat().st_size
        assert 0 < have < len(data)
        server.delay = 0
        main([str(tmp_path), '--url', f'{server.url}/a.zip'])
        assert (tmp_path / FOLDER / 'noise').read_bytes() == noise
        assert server.sent[-1] == len(data) - have
        assert 'Going on after' in capsys.readouterr().out
