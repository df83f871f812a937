"""Pictures and reports from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import small_config
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from test_visualization import check_page

from pm_seg.cli import compress as compress_tool
from pm_seg.cli import visualize
from pm_seg.engine import Measuring, compress
from pm_seg.models.distillation import strip_compression

MERGING = """
_base_ = './pm.py'
model = dict(
    backbone=dict(compression=dict(_delete_=True, type='{kind}', {options})))
"""


def save(model, path: Path) -> str:
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A user's folder: config, dense and compressed checkpoint, images."""
    folder = tmp_path_factory.mktemp('work')
    cfg = small_config(scenes, folder / 'run')
    cfg.dump(folder / 'pm.py')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    dense = MODELS.build(ConfigDict(strip_compression(cfg.model.to_dict())))
    dense.init_weights()
    save(dense, folder / 'dense.pth')
    model = MODELS.build(cfg.model)
    model.load_state_dict(dense.state_dict(), strict=False)
    compress(model, cfg.train_dataloader, measuring=Measuring(calib_batches=1))
    save(model, folder / 'pm.pth')
    for kind, options in (
        ('tome', 'keep=0.8'),
        ('algm', 'keep=0.8'),
        ('paper', 'keep_rate=0.5'),
    ):
        text = MERGING.format(kind=kind, options=options)
        (folder / f'{kind}.py').write_text(text)
    (folder / 'images').symlink_to(scenes / 'images/validation')
    return folder


def draw(
    work: Path, *arguments: str, config: str = 'pm.py'
) -> dict[str, np.ndarray]:
    """The pictures a command draws."""
    out = work / 'out' / str(len(list(work.glob('out/*'))))
    visualize.main([str(work / config), *arguments, '--out-dir', str(out)])
    files = {path.name: cv2.imread(str(path)) for path in out.iterdir()}
    assert all(picture.std() > 10 for picture in files.values())
    return files


def names(work: Path) -> list[str]:
    return sorted(path.stem for path in (work / 'images').iterdir())


def test_a_folder_of_images_is_drawn(work: Path, capsys) -> None:
    pictures = draw(work, str(work / 'pm.pth'), str(work / 'images'))
    assert set(pictures) == {'tokens.png'} | {
        f'{name}_{kind}.png'
        for name in names(work)
        for kind in ('groups', 'prediction')
    }
    shown = capsys.readouterr().out
    assert shown.count('of the pixels differ') == 3


def test_other_weights_and_images_of_one_name(
    work: Path, tmp_path: Path, capsys
) -> None:
    """Compared with other weights; two images called alike."""
    image = next((work / 'images').iterdir())
    same = tmp_path / image.name
    same.write_bytes(image.read_bytes())
    other = torch.load(work / 'dense.pth')
    for value in other['state_dict'].values():
        value += torch.randn_like(value) * 0.2
    torch.save(other, tmp_path / 'other.pth')
    files = [str(image), str(same)]
    draw(work, str(work / 'pm.pth'), *files)
    own = capsys.readouterr().out
    pictures = draw(
        work, str(work / 'pm.pth'), *files,
        '--dense-checkpoint', str(tmp_path / 'other.pth'),
    )  # fmt: skip
    assert {f'{image.stem}_groups.png', f'{image.stem}_2_groups.png'} <= set(
        pictures
    )
    assert capsys.readouterr().out.splitlines()[:2] != own.splitlines()[:2]


@pytest.mark.parametrize('kind', ['pm', 'tome', 'algm'])
def test_groups_of_images_need_no_compressed_checkpoint(
    work: Path, kind: str
) -> None:
    image = str(next((work / 'images').iterdir()))
    pictures = draw(work, str(work / 'dense.pth'), image, config=f'{kind}.py')
    assert 'tokens.png' in pictures and 'scores.png' not in pictures
    assert len(pictures) == 3


@pytest.mark.parametrize(
    ('config', 'arguments', 'message'),
    [
        ('paper', ('dense.pth', 'images'), 'has no token groups yet'),
        ('pm', ('pm.pth', 'missing.jpg'), 'Image not found: .*missing.jpg'),
        ('pm', ('no.pth', 'images'), 'Checkpoint not found'),
        ('pm', ('pm.pth', 'run'), 'No images in the folder'),
    ],
)
def test_mistakes_are_explained(work, config, arguments, message) -> None:
    (work / 'run').mkdir(exist_ok=True)
    paths = [str(work / name) for name in arguments]
    with pytest.raises(SystemExit, match=message):
        draw(work, *paths, config=f'{config}.py')


def test_scores_of_the_paper_are_drawn(work: Path) -> None:
    config = str(work / 'paper.py')
    out = str(work / 'paper.pth')
    compress_tool.main(
        [config, str(work / 'dense.pth'), '--out', out, '--score-batches', '1']
    )
    image = str(next((work / 'images').iterdir()))
    assert 'scores.png' in draw(work, out, image, config='paper.py')


def test_a_dense_config_is_refused(work: Path) -> None:
    with pytest.raises(SystemExit, match='nothing to compress'):
        draw(
            work, str(work / 'dense.pth'), str(work / 'images'),
            '--cfg-options', 'model.backbone.compression=None',
        )  # fmt: skip


def test_the_report_of_a_compression(work: Path, capsys) -> None:
    page = work / 'reports/report.html'
    compress_tool.main(
        [
            str(work / 'pm.py'), str(work / 'dense.pth'), '--out',
            str(work / 'again.pth'), '--evaluate', '--report', str(page),
            '--keep', '0.5',
        ]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert 'dense:' in shown and 'compressed:' in shown and 'mIoU' in shown
    text = page.read_text()
    checker = check_page(text)
    for part in (
        'What was compressed', 'Structure and costs', 'Speed', 'Accuracy',
        'Pictures', 'keep=0.5', 'dense.pth', 'pm_seg ', 'torch ',
        'GMACs', 'mIoU', names(work)[0], 'now wrong', 'backbone 1: ',
        'tools/compress.py', '2 batches',
    ):  # fmt: skip
        assert part in text, part
    # Chart; 5 pictures and 2 layers of each of two images.
    assert len(checker.sources) == 1 + 2 * 7


def test_a_report_without_data(work: Path, capsys) -> None:
    """Merging needs none; there are no pictures and no accuracy then."""
    page = work / 'tome.html'
    compress_tool.main(
        [
            str(work / 'tome.py'), str(work / 'dense.pth'), '--out',
            str(work / 'tome.pth'), '--calib-batches', '0', '--report',
            str(page), '--cfg-options',
            'val_dataloader.dataset.data_root=nowhere',
        ]
    )  # fmt: skip
    assert 'No pictures in the report' in capsys.readouterr().err
    text = page.read_text()
    check_page(text)
    assert 'no images to draw' in text and 'Not measured' in text
    assert 'attention' in text and '<h2>Scores' not in text


CLASSIFIER = """
custom_imports = dict(imports=['pm_seg'])
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(
        type='PMDistilledVisionTransformer', img_size=64,
        arch=dict(embed_dims=24, num_layers=2, num_heads=3,
                  feedforward_channels=48),
        compression=dict(keep=0.7, first=1)),
    head=dict(type='DeiTClsHead', num_classes=10, in_channels=24))
test_dataloader = dict(
    dataset=dict(
        type='CIFAR10',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='ResizeEdge', scale=64, edge='short'),
            dict(type='CenterCrop', crop_size=64), dict(type='PackInputs')]))
"""


def test_the_best_classes_of_a_classifier(tmp_path: Path, capsys) -> None:
    """The likeliest classes in place of maps, on a picture of any size."""
    pytest.importorskip('mmpretrain')
    (tmp_path / 'pm.py').write_text(CLASSIFIER)
    cfg = Config.fromfile(tmp_path / 'pm.py')
    init_default_scope('mmpretrain')
    model = MMENGINE_MODELS.build(cfg.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save(model, tmp_path / 'pm.pth')
    image = np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'bird.png'), image)
    pictures = draw(tmp_path, str(tmp_path / 'pm.pth'), f'{tmp_path}/bird.png')
    assert set(pictures) == {
        'tokens.png', 'bird_groups.png', 'bird_prediction.png',
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert 'bird: probability, %' in shown
    rows = re.findall(r'│ (\w+) +│ +([\d.]+) │ +([\d.]+) │', shown)
    assert 5 <= len(rows) <= 10
    known = {'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog'}
    assert {name for name, _, _ in rows} & known
    dense = [float(value) for _, value, _ in rows]
    assert dense == sorted(dense, reverse=True)
    assert dense != [float(value) for _, _, value in rows]
