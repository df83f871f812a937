"""Checkpoints that a command or a config names, before work starts."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from filelock import FileLock
from mmengine.config import Config

from ..utils.checkpoints import latest_intact_checkpoint


def fetch_checkpoint(source: str) -> str:
    """Local path of a checkpoint, which may be an http(s) address.

    A file of the same name in ``checkpoints/`` is used instead of downloading.
    The first process of a machine downloads, the others wait for the file.
    """
    if urlparse(source).scheme not in ('http', 'https'):
        if '://' in source or Path(source).is_file():
            return source
        raise SystemExit(
            f'Checkpoint not found: {source}\nGive the path of a .pth file, '
            'or for training without one add --cfg-options load_from=None.'
        )
    name = Path(urlparse(source).path).name
    local = Path('checkpoints') / name
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / name
    for known in (local, cached):
        if known.is_file():
            return str(known)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{cached}.lock'):
        if not cached.is_file():
            print(f'Downloading {source}', file=sys.stderr)
            try:
                torch.hub.download_url_to_file(source, str(cached))
            except (URLError, OSError) as error:
                raise SystemExit(
                    f'Could not download {source}\n({error})\nDownload it '
                    f'elsewhere and put it at {local}, or start without it: '
                    '--cfg-options load_from=None'
                ) from None
    return str(cached)


def prepare_resume(cfg: Config) -> None:
    """Let the run go on from its own latest checkpoint, or start it.

    mmengine would take ``load_from``, the dense checkpoint, for the one to
    resume from. What a killed process left unfinished is removed.
    """
    for rest in Path(cfg.work_dir).glob('*.pth.*.partial'):
        rest.unlink(missing_ok=True)
    found = latest_intact_checkpoint(cfg.work_dir)
    cfg.resume = found is not None
    if found:
        cfg.load_from = found
    else:
        print(f'Nothing to resume in {cfg.work_dir}, starting anew')
        check_checkpoints(cfg)


def fix_teacher(cfg: Config) -> None:
    """Name the teacher's checkpoint: what the run starts from first."""
    teacher = cfg.model.get('teacher')
    if teacher is None:
        return
    checkpoint = teacher.get('checkpoint') or cfg.get('load_from')
    if checkpoint:
        teacher.checkpoint = fetch_checkpoint(checkpoint)
        return
    print(
        'No dense checkpoint to distil from (load_from=None): training on '
        'labels alone',
        file=sys.stderr,
    )
    cfg.model.teacher = None


def check_checkpoints(cfg: Config) -> None:
    """Make ``load_from`` and pretrained weights local before work starts."""
    named = [(cfg, 'load_from')]
    if not cfg.get('load_from'):  # which would overwrite these
        backbone = cfg.model.get('backbone') or {}
        init_cfg = backbone.get('init_cfg')
        named = [(cfg.model, 'pretrained'), (backbone, 'pretrained')]
        if isinstance(init_cfg, dict):
            named.append((init_cfg, 'checkpoint'))
    for node, key in named:
        if isinstance(node.get(key), str):
            node[key] = fetch_checkpoint(node[key])
