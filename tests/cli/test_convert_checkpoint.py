"""tools/convert_checkpoint.py, run as a user would."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import (
    build_classifier,
    close,
    random_segmenter,
    random_vit,
    run_segmenter,
)
from helpers import ROOT, run_tool, shared_path
from mmengine.config import Config
from mmseg.apis import init_model

from pm_seg.cli.convert_checkpoint import main
from pm_seg.utils.checkpoints import read_checkpoint


def test_golden_segmenter(tmp_path: Path) -> None:
    """Command line, config file and mmseg's own loading."""
    path = shared_path('golden/pm_segmenter_keep0.7.npz')
    out = tmp_path / 'new/pm.pth'
    result = run_tool(
        ROOT / 'tools/convert_checkpoint.py', 'pm-segmenter', path, out
    )
    assert f'Wrote {out} and {out.with_suffix(".py")}' in result.stdout
    assert sorted(os.listdir(out.parent)) == ['pm.pth', 'pm.py']
    model = init_model(str(out.with_suffix('.py')), str(out), device='cpu')
    with np.load(path) as file, torch.no_grad():
        masks = model(torch.from_numpy(file['image']), mode='tensor')
        expected = torch.from_numpy(file['masks'])
    masks = F.interpolate(masks, size=expected.shape[2:], mode='bilinear')
    close(masks, expected)
    assert len(model.dataset_meta['classes']) == 7


@pytest.mark.parametrize('suffix', ['npz', 'pth'])
def test_golden_classifier(tmp_path: Path, suffix: str) -> None:
    path = shared_path('golden/pm_vit_keep0.6_prune0.1.npz')
    with np.load(path) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    if suffix == 'pth':
        path = tmp_path / 'golden.pth'
        torch.save(golden, path)
    main(['pm-vit', str(path), str(tmp_path / 'x.pth')])
    cfg = Config.fromfile(tmp_path / 'x.py')
    assert cfg.default_scope == 'mmpretrain'
    saved = read_checkpoint(tmp_path / 'x.pth')
    assert saved['meta']['converted_from'] == f'pm-vit {path.name}'
    model = build_classifier(cfg.model.to_dict(), saved['state_dict'])
    close(model(golden['image']), golden['logits'])


def test_segmenter_with_variant(tmp_path: Path, capsys) -> None:
    state = random_segmenter(classes=19, grid=(2, 3))
    torch.save(dict(model=state, n_cls=19), tmp_path / 'checkpoint.pth')
    (tmp_path / 'variant.yml').write_text(
        'dataset_kwargs: {dataset: cityscapes, normalization: vit}\n'
        'net_kwargs:\n  image_size: !!python/tuple [16, 24]\n  n_heads: 4\n'
    )
    out = tmp_path / 'out.pth'
    main(['segmenter', str(tmp_path / 'checkpoint.pth'), str(out)])
    assert 'guess' not in capsys.readouterr().out
    model = init_model(str(tmp_path / 'out.py'), str(out), device='cpu')
    assert model.dataset_meta['classes'][0] == 'road'
    image = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        masks = model(image, mode='tensor')
        whole = model.encode_decode(image, [dict(img_shape=(16, 24))])
    close(masks, run_segmenter(state, image, heads=4))
    assert whole.shape == (1, 19, 16, 24)


def test_options(tmp_path: Path) -> None:
    torch.save(random_vit(grid=(2, 3), dims=96), tmp_path / 'x.pth')
    out = tmp_path / 'out.pth'
    main(
        ['timm', str(tmp_path / 'x.pth'), str(out), '--num-heads', '3']
        + ['--img-size', '16', '24', '--normalization', 'imagenet']
    )
    model = Config.fromfile(tmp_path / 'out.py').model
    assert model.backbone.arch.num_heads == 3
    assert tuple(model.backbone.img_size) == (16, 24)
    assert model.data_preprocessor.mean[0] == 123.675


def test_errors_leave_no_files(tmp_path: Path) -> None:
    torch.save(dict(w=torch.ones(3)), tmp_path / 'foreign.pth')
    (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04')
    out = tmp_path / 'out' / 'x.pth'
    for name, message in (
        ('foreign.pth', 'this is no timm Vision Transformer checkpoint'),
        ('cut.pth', 'cannot be read'),
        ('none.pth', 'is not a file'),
    ):
        result = run_tool(
            ROOT / 'tools/convert_checkpoint.py', 'timm', tmp_path / name, out,
            check=False,
        )  # fmt: skip
        assert result.returncode == 1
        assert message in result.stderr
        assert 'Traceback' not in result.stderr
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        ('x.pt', 'ends in .pth'),
        ('x.pth', 'is the input'),
        ('folder.pth', 'is a folder'),
        ('full/y.pth', 'full'),
    ],
)
def test_bad_outputs(tmp_path: Path, output: str, message: str) -> None:
    torch.save(random_vit(), tmp_path / 'x.pth')
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'full').touch()
    before = (tmp_path / 'x.pth').read_bytes()
    with pytest.raises(SystemExit, match=message):
        main(['timm', str(tmp_path / 'x.pth'), str(tmp_path / output)])
    assert (tmp_path / 'x.pth').read_bytes() == before
    assert len(os.listdir(tmp_path)) == 3


def test_a_failed_write_keeps_the_old_files(
    tmp_path: Path, monkeypatch
) -> None:
    torch.save(random_vit(), tmp_path / 'x.pth')
    (tmp_path / 'out.pth').write_text('old')
    (tmp_path / 'out.py').write_text('old')

    def fail(content: object, path: Path) -> None:
        Path(path).write_text('half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(SystemExit, match='No space left'):
        main(['timm', str(tmp_path / 'x.pth'), str(tmp_path / 'out.pth')])
    assert sorted(os.listdir(tmp_path)) == ['out.pth', 'out.py', 'x.pth']
    assert (tmp_path / 'out.pth').read_text() == 'old'
    assert (tmp_path / 'out.py').read_text() == 'old'
