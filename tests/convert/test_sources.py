"""Reading foreign files: formats, layouts, damage, code."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from pm_seg.convert import read_source
from pm_seg.utils.checkpoints import CheckpointError

STATE = {'a.weight': torch.arange(4.0), 'b.bias': torch.ones(2)}


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    'content',
    [
        STATE,
        OrderedDict(STATE),
        dict(model=STATE, epoch=3, optimizer=dict(state={})),
        dict(state_dict=STATE, args=argparse.Namespace(lr=0.1, name='x')),
        dict(model={f'module.{k}': v for k, v in STATE.items()}),
        {f'sd/{k}': v for k, v in STATE.items()} | {'image': torch.ones(1)},
        dict(model={k: v.half() for k, v in STATE.items()}),
    ],
)
def test_layouts(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / 'x.pth')
    state, _ = read_source(tmp_path / 'x.pth')
    assert state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert torch.equal(state[key], value)


@pytest.mark.parametrize('where', ['beside', 'inside'])
def test_facts(tmp_path: Path, where: str) -> None:
    facts = dict(channels=[5, 4], num_heads=2, keep=0.5, scores=torch.ones(2))
    content = (
        {**STATE, **facts} if where == 'inside' else dict(model=STATE, **facts)
    )
    torch.save(content, tmp_path / 'x.pth')
    state, hints = read_source(tmp_path / 'x.pth')
    assert state.keys() == STATE.keys()
    assert hints.facts['channels'].tolist() == [5, 4]
    assert hints.num_heads == 2
    assert read_source(tmp_path / 'x.pth', num_heads=3)[1].num_heads == 3


def test_formats(tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in STATE.items()}
    np.savez(tmp_path / 'x.npz', **arrays, name=np.array('vit'))
    assert read_source(tmp_path / 'x.npz')[0].keys() == STATE.keys()
    torch.save(
        STATE, tmp_path / 'old.pth', _use_new_zipfile_serialization=False
    )
    assert read_source(tmp_path / 'old.pth')[0].keys() == STATE.keys()


def test_safetensors(tmp_path: Path) -> None:
    torch_io = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'x.safetensors'
    torch_io.save_file(STATE, path)
    assert read_source(path)[0].keys() == STATE.keys()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match='truncated, damaged'):
        read_source(path)


def test_safetensors_without_its_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / 'x.safetensors').write_bytes(b'0' * 64)
    for name in ('safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_source(tmp_path / 'x.safetensors')


def test_code_is_refused(tmp_path: Path) -> None:
    attack = Attack(tmp_path / 'pwned')
    torch.save(dict(model=STATE, x=attack), tmp_path / 'x.pth')
    np.savez(tmp_path / 'x.npz', x=np.array([attack], dtype=object))
    torch.save(
        dict(model=STATE, x=attack),
        tmp_path / 'old.pth',
        _use_new_zipfile_serialization=False,
    )
    for name in ('x.pth', 'x.npz', 'old.pth'):
        with pytest.raises(CheckpointError, match='could run code') as error:
            read_source(tmp_path / name)
        assert 'weights_only' not in str(error.value)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('suffix', ['pth', 'npz'])
@pytest.mark.parametrize('damage', ['empty', 'cut', 'flipped', 'text'])
def test_damage(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f'x.{suffix}'
    weights = torch.rand(1000)
    if suffix == 'pth':
        torch.save(dict(w=weights), path)
    else:
        np.savez(path, w=weights.numpy())
    data = bytearray(path.read_bytes())
    place = data.find(weights.numpy().tobytes()[:64])
    assert place > 0
    data[place + 8] ^= 0xFF
    path.write_bytes(
        dict(
            empty=b'',
            cut=path.read_bytes()[:-500],
            flipped=bytes(data),
            text=b'<html>404 Not Found</html>',
        )[damage]
    )
    with pytest.raises(CheckpointError, match='truncated, damaged or no'):
        read_source(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([1, 2], 'holds a list; expected a dict'),
        (dict(epoch=3), 'holds no weights: got epoch'),
        (dict(model={}), 'holds no weights'),
        (dict(w=torch.tensor([float('nan')])), 'w contains NaN'),
        (dict(model=STATE, keep='much'), 'entry keep is a str'),
    ],
)
def test_no_weights(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=message):
        read_source(tmp_path / 'x.pth')


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is not a file'):
        read_source(tmp_path / 'x.pth')


def test_variant(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / 'checkpoint.pth')
    path = tmp_path / 'variant.yml'
    path.write_text(
        'net_kwargs:\n  image_size: !!python/tuple\n  - 512\n  - 512\n'
    )
    _, hints = read_source(tmp_path / 'checkpoint.pth')
    assert hints.variant == dict(net_kwargs=dict(image_size=(512, 512)))
    target = tmp_path / 'pwned'
    for text in (
        f'a: !!python/object/apply:os.mkdir ["{target}"]',
        'a: [',
        'a: !!int b',
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match='move it away'):
            read_source(tmp_path / 'checkpoint.pth')
    assert not target.exists()


def test_pretrained_cfg(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / 'x.pth')
    path = tmp_path / 'config.json'
    path.write_text('{"pretrained_cfg": {"mean": [0.5], "std": [1, 2]}}')
    _, hints = read_source(tmp_path / 'x.pth')
    assert hints.pretrained_cfg == dict(mean=[0.5], std=[1.0, 2.0])
    for text in ('not json', '[1]', '{"pretrained_cfg": {"mean": "x"}}'):
        path.write_text(text)
        assert read_source(tmp_path / 'x.pth')[1].pretrained_cfg == {}
