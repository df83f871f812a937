"""No code from checkpoints, no network, no Python objects from YAML."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from bad_input import Workspace, benchmark, export_onnx, malicious
from helpers import needs_exporter
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from pm_seg.cli import convert_checkpoint
from pm_seg.cli.config import check_environment
from pm_seg.utils.checkpoints import TRUST, CheckpointError


@pytest.fixture(scope='module')
def workspace(tmp_path_factory) -> Iterator[Workspace]:
    made = Workspace(tmp_path_factory.mktemp('workspace'))
    malicious(made)
    yield made


@pytest.fixture
def ws(workspace: Workspace) -> Iterator[Workspace]:
    yield workspace
    workspace.tidy()
    pwned = Path(workspace('pwned'))
    if pwned.exists():
        pwned.rmdir()


def _resume(ws: Workspace) -> None:
    Path(ws('work')).mkdir(exist_ok=True)
    malicious(ws, 'work/iter_2.pth')
    ws.tune('resume=True')


def _teacher(ws: Workspace) -> None:
    cfg = Config.fromfile(ws('pm.py'))
    cfg.model.teacher = dict(alpha=0.5, tau=20.0, checkpoint=ws('bad.pth'))
    cfg.load_from = ws('pm.pth')
    cfg.dump(ws('teacher.py'))
    ws.train(config='teacher.py')


def _pretrained(ws: Workspace) -> None:
    cfg = Config.fromfile(ws('pm.py'))
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=ws('bad.pth')
    )
    cfg.dump(ws('pretrained.py'))
    ws.train(config='pretrained.py')


def _last_checkpoint_of_mmengine(ws: Workspace) -> None:
    CheckpointLoader.load_checkpoint(ws('bad.pth'), 'cpu')


TOOLS: dict[str, Callable[[Workspace], object]] = {
    'test': lambda ws: ws.test('bad.pth'),
    'train': lambda ws: ws.train(f'load_from={ws("bad.pth")}'),
    'resume': _resume,
    'teacher': _teacher,
    'pretrained': _pretrained,
    'compress': lambda ws: ws.compress(checkpoint='bad.pth'),
    'benchmark': lambda ws: benchmark.main([ws('pm.py'), ws('bad.pth')]),
    'export': lambda ws: export_onnx.main(
        [ws('pm.py'), ws('bad.pth'), '--out', ws('out.onnx')]
    ),
    'convert': lambda ws: convert_checkpoint.main(
        ['timm', ws('bad.pth'), ws('out.pth')]
    ),
    'mmengine': _last_checkpoint_of_mmengine,
}


@pytest.mark.parametrize(
    'tool',
    [
        pytest.param(tool, marks=needs_exporter if tool == 'export' else ())
        for tool in TOOLS
    ],
)
def test_code_in_a_checkpoint_is_not_run(tool: str, ws: Workspace) -> None:
    before = ws.files()
    with pytest.raises((SystemExit, CheckpointError)) as error:
        TOOLS[tool](ws)
    message = str(error.value)
    assert 'run code' in message and 'trust' in message
    assert 'mkdir' in message  # what it wanted
    assert not Path(ws('pwned')).exists()
    after = ws.files()
    assert before.items() <= after.items()
    new = {Path(name).name for name in set(after) - set(before)}
    assert new <= {'iter_2.pth', 'teacher.py', 'pretrained.py'}


def test_the_attack_works_where_it_is_let(ws: Workspace, monkeypatch) -> None:
    """And the tools' setting stops even that."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(UnpicklingError):
        torch.load(ws('bad.pth'), weights_only=False)
    assert not Path(ws('pwned')).exists()
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    torch.load(ws('bad.pth'), weights_only=False)
    assert Path(ws('pwned')).is_dir()


def test_trusted_files(ws: Workspace, monkeypatch) -> None:
    """The user can ask for it, with torch's own variable."""
    monkeypatch.setenv(TRUST, '1')
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    found = CheckpointLoader.load_checkpoint(ws('bad.pth'), 'cpu')
    assert Path(ws('pwned')).is_dir() and 'state_dict' in found


def test_a_config_in_a_checkpoint_is_not_run(ws: Workspace) -> None:
    """mmengine runs ``meta['config']`` as Python when it resumes."""
    code = f'__import__("os").mkdir({ws("pwned")!r})\ngpu_ids = []\n'
    meta = dict(config=code, iter=1, epoch=0)
    torch.save(dict(state_dict={}, meta=meta), ws('evil.pth'))
    try:
        loaded = CheckpointLoader.load_checkpoint(ws('evil.pth'), 'cpu')
    finally:
        os.remove(ws('evil.pth'))
    assert loaded['meta'] == dict(iter=1, epoch=0)
    Config.fromstring(code, '.py')  # what resuming would have done
    assert Path(ws('pwned')).is_dir()


def test_no_network(ws: Workspace, monkeypatch) -> None:
    """compress, test and train, with all ways to a network closed."""

    def closed(*args, **kwargs):
        raise AssertionError(f'network access: {args}')

    for name in ('connect', 'connect_ex', 'sendto'):
        monkeypatch.setattr(socket.socket, name, closed)
    for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
        monkeypatch.setattr(socket, name, closed)
    with pytest.raises(AssertionError, match='network access'):
        socket.create_connection(('127.0.0.1', 9))
    ws.compress('--calib-batches', '1')
    ws.test('out.pth')
    ws.train(f'load_from={ws("out.pth")}', 'train_cfg.max_iters=1')
    os.remove(ws('out.pth'))
    assert Path(ws('work/iter_1.pth')).is_file()


def test_yaml_configs_are_data(ws: Workspace) -> None:
    check_environment()
    bad = Path(ws('bad.yaml'))
    attack = f'!!python/object/apply:os.mkdir [{ws("pwned")}]'
    bad.write_text(f'model: {attack}\n')
    with pytest.raises(Exception, match='could not determine a constructor'):
        Config.fromfile(str(bad))
    assert not Path(ws('pwned')).exists()
    bad.write_text('model: {type: X, sizes: [1, 2]}\n')
    assert Config.fromfile(str(bad)).model.sizes == [1, 2]
    bad.unlink()


def test_sources_load_nothing_unsafely() -> None:
    """No unsafe pickle, YAML or torch.load in the package."""
    import pm_seg

    root = Path(pm_seg.__file__).parent
    allowed = {'utils/checkpoints.py': ['weights_only=False']}
    for file in root.rglob('*.py'):
        text = file.read_text()
        for unsafe in (
            'pickle.load',
            'yaml.unsafe_load',
            'yaml.full_load',
            'yaml.Loader',
            'allow_pickle=True',
            'weights_only=False',
            'eval(compile',
        ):
            name = str(file.relative_to(root))
            if unsafe in text:
                assert unsafe in allowed.get(name, []), (name, unsafe)
