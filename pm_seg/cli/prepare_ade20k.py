"""Download, unpack and check ADE20K (MIT Scene Parsing Benchmark)."""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from ..utils.download import DownloadError, download, partial_files, verify
from ..utils.progress import ProgressReporter
from .parser import command, make_parser, wrong_usage

FOLDER = 'ADEChallengeData2016'
URL = f'http://data.csail.mit.edu/places/ADEchallenge/{FOLDER}.zip'
#: SHA-1 of that file, as other projects that download it have it.
SHA1 = '219e1696abb36c8ba3a3afe7fb2f4b4606a897c7'
#: Pictures in each part of the benchmark.
COUNTS = {'training': 20210, 'validation': 2000}
#: At most: size unpacked, in blocks of the disk, over size of the zip.
UNPACKED = 1.2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'prepare_ade20k.py',
        'Put ADE20K where the configs look for it: download '
        f'{FOLDER}.zip (0.97 GB), compare its checksum, unpack it and check '
        'that all pictures and annotations are there. The dataset has terms '
        'of use, see https://groups.csail.mit.edu/vision/datasets/ADE20K.'
        '\n\n'
        'Interrupted, or the network gone? Run it again: a download goes on '
        'where it stopped, and nothing half unpacked is left behind.',
        ('download, unpack and check, into data/ade', ''),
        (
            'the zip is here already; put the data on a big disk',
            '/big/disk/ade --zip ADEChallengeData2016.zip',
        ),
        (
            'is this folder whole?',
            '--check data/ade/ADEChallengeData2016',
        ),
    )
    parser.add_argument(
        'root',
        nargs='?',
        default='data/ade',
        help=f'folder to put {FOLDER} into (default data/ade)',
    )
    group = parser.add_argument_group('where it comes from')
    group.add_argument('--url', default=URL, help=f'default {URL}')
    group.add_argument(
        '--zip', metavar='FILE', help='a zip you have, instead of downloading'
    )
    group.add_argument(
        '--checksum',
        metavar='HEX',
        help='MD5, SHA-1 or SHA-256 of the zip; "none" compares nothing. '
        'Defaults to the known one; with --url, to none',
    )
    group = parser.add_argument_group('what to do')
    group.add_argument(
        '--check',
        metavar='DIR',
        help='check a folder and do nothing else; exit code 1 if it is not '
        'whole',
    )
    for flag, what in (
        ('--overwrite', f'replace a {FOLDER} that is not whole'),
        ('--delete-zip', 'delete the zip when all is done'),
    ):
        group.add_argument(flag, action='store_true', help=what)
    return parser.parse_args(argv)


def check_layout(root: Path, counts: dict[str, int] | None = None) -> str:
    """What is wrong with a folder; '' if it is ADE20K, whole.

    Args:
        root (Path): A folder with ``images`` and ``annotations``.
        counts (dict, optional): Pictures expected in each part. Defaults to
            those of the benchmark.
    """
    if not root.is_dir():
        return f'{root} does not exist'
    if not (root / 'images').is_dir() and (root / FOLDER).is_dir():
        return f'{root} is one folder too high: use {root / FOLDER}'
    problems: list[str] = []
    for part, expected in (counts or COUNTS).items():
        names: list[set[str]] = []
        for kind, suffix in (('images', '.jpg'), ('annotations', '.png')):
            folder, where = root / kind / part, f'{kind}/{part}'
            if not folder.is_dir():
                problems.append(f'{where}: there is no such folder')
                continue
            with os.scandir(folder) as entries:
                found = [e for e in entries if e.name.endswith(suffix)]
            if len(found) != expected:
                problems.append(
                    f'{where}: {len(found)} *{suffix} files, expected '
                    f'{expected}'
                )
            if empty := {e.name for e in found if not e.stat().st_size}:
                problems.append(f'{where}: {_some(empty)} have no content')
            names.append({e.name.removesuffix(suffix) for e in found})
        if len(names) == 2:
            images, annotations = names
            if alone := images - annotations:
                problems.append(f'{part}: no annotation for {_some(alone)}')
            if alone := annotations - images:
                problems.append(f'{part}: no picture for {_some(alone)}')
    if not problems:
        return ''
    return '\n  '.join([f'{root} is not whole:', *problems])


def _some(names: set[str]) -> str:
    shown = ', '.join(sorted(names)[:3])
    more = len(names) - 3
    return f'{shown} and {more} more' if more > 0 else shown


def require_space(folder: Path, needed: float, what: str) -> None:
    """Stop before a disk gets full.

    Raises:
        SystemExit: Saying how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f'{what} needs {needed / 1e9:.2f} GB in {folder}, where '
            f'{free / 1e9:.2f} GB are free. Make room, or give another '
            'folder as the first argument.'
        )


def fetch(url: str, target: Path, checksum: str | None) -> None:
    """Download the zip with a progress bar."""
    reporter = None

    def progress(done: int, total: int) -> None:
        nonlocal reporter
        if reporter is None:
            if done:
                print(f'Going on after {done / 1e6:.0f} MB', flush=True)
            reporter = stack.enter_context(
                ProgressReporter('Downloading', total, start=done, size=True)
            )
        reporter(done)

    def before(rest: int) -> None:
        whole = rest + partial.stat().st_size if partial.exists() else rest
        needed = rest + UNPACKED * whole
        require_space(target.parent, needed, 'The zip, and unpacking it,')

    partial, _ = partial_files(target)
    with ExitStack() as stack:
        download(url, target, checksum, progress, before)


def unpack(
    path: Path, target: Path, counts: dict[str, int] | None = None
) -> None:
    """Unpack the folder ``target.name`` of a zip; all of it or nothing.

    Args:
        path (Path): The zip.
        target (Path): Folder to write; what is there is replaced.
        counts (dict, optional): See :func:`check_layout`.

    Raises:
        SystemExit: If the zip is damaged, has paths that lead elsewhere,
            does not fit the disk or is another dataset.
    """
    temporary = Path(
        tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent)
    )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _require_safe(path, members)
            total = sum(member.file_size for member in members)
            # A small file fills a block of the disk.
            needed = total + 4096 * len(members)
            require_space(target.parent, needed, 'Unpacking')
            with ProgressReporter('Unpacking', total, size=True) as report:
                done = 0
                for member in members:
                    archive.extract(member, temporary)
                    done += member.file_size
                    report(done)
        problem = check_layout(temporary / target.name, counts)
        if problem:
            problem = problem.replace(f'{temporary}{os.sep}', '')
            raise SystemExit(f'{path} is another dataset: {problem}')
        if target.exists():
            os.rename(target, temporary / 'old')
        os.rename(temporary / target.name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SystemExit(
            f'{path} is damaged or no zip ({error}). Delete it and run the '
            'command again.'
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_safe(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse a zip that would write outside of its folder."""
    for member in members:
        name = member.filename.replace('\\', '/')
        parts = PurePosixPath(name).parts
        link = stat.S_ISLNK(member.external_attr >> 16)
        if name.startswith('/') or '..' in parts or ':' in name or link:
            raise SystemExit(
                f'{path} is not safe to unpack: {member.filename!r} leads '
                'out of the folder. Nothing was unpacked.'
            )


def _get_zip(args: argparse.Namespace, root: Path) -> Path:
    checksum = args.checksum
    if checksum == 'none':
        checksum = None
    elif checksum is None and args.url == URL:
        checksum = SHA1
    if args.zip:
        path = Path(args.zip).expanduser()
        if not path.is_file():
            raise SystemExit(f'--zip {path}: there is no such file')
    else:
        path = root / f'{FOLDER}.zip'
        if not path.exists():
            fetch(args.url, path, checksum)
            return path
        print(f'{path} is there already')
    if checksum:
        verify(path, checksum)
    return path


def _report_whole(folder: Path) -> None:
    pictures = ' and '.join(f'{n} {part}' for part, n in COUNTS.items())
    print(f'{folder} is whole: {pictures} pictures with annotations')


@command('Run the command again to go on; what was downloaded is kept.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/prepare_ade20k.py``."""
    args = parse_args(argv)
    if args.check:
        if problem := check_layout(Path(args.check)):
            raise SystemExit(
                f'{problem}\nTo get what is missing: python '
                'tools/prepare_ade20k.py [FOLDER] --overwrite'
            )
        _report_whole(Path(args.check))
        return
    root = Path(args.root).expanduser()
    target = root / FOLDER
    if target.exists():
        problem = check_layout(target)
        if not problem:
            _report_whole(target)
            return
        if not args.overwrite:
            raise SystemExit(
                f'{problem}\nTo replace it add --overwrite, or give another '
                'folder as the first argument.'
            )
    root.mkdir(parents=True, exist_ok=True)
    try:
        path = _get_zip(args, root)
    except DownloadError as error:
        raise SystemExit(str(error)) from None
    except ValueError as error:
        wrong_usage(f'--checksum: {error}')
    unpack(path, target)
    if args.delete_zip:
        path.unlink()
    _report_whole(target)
    if root != Path('data/ade'):
        print(f'Use it with --cfg-options data_root={target}')


if __name__ == '__main__':
    main()
