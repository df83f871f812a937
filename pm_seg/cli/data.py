"""Whether the datasets of a config are there, before work starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmseg.registry import DATASETS

_DATASET_HELP = {
    'ADE20KDataset': (
        'ADE20K: download http://data.csail.mit.edu/places/ADEchallenge/'
        'ADEChallengeData2016.zip ("wget -c" goes on where it stopped) and '
        'unzip it, so that images/ and annotations/ lie in the data root.'
    ),
    'CamVidDataset': (
        'CamVid: put images/{train,val,test} and annotations/'
        '{train,val,test} (class indices 0-10, 255 ignored) in the data root.'
    ),
    'ImageNet': (
        'ImageNet: put train/ and val/, with a folder of pictures for each '
        'class, in the data root; or pictures and the annotation file the '
        'config names.'
    ),
    'CityscapesDataset': (
        'Cityscapes: unpack leftImg8bit_trainvaltest.zip and '
        'gtFine_trainvaltest.zip in the data root, then make the '
        '*_labelTrainIds.png: pip install cityscapesscripts; '
        'CITYSCAPES_DATASET=DATA_ROOT csCreateTrainIdLabelImgs'
    ),
    'PascalContextDataset': (
        'Pascal Context: put JPEGImages of VOC2010, SegmentationClassContext '
        'and ImageSets/SegmentationContext in the data root; '
        'tools/dataset_converters/pascal_context.py of mmsegmentation makes '
        'the latter two.'
    ),
    'CustomDataset': 'Put a folder of pictures for each class there.',
}
_DATASET_FALLBACK = (
    'No data at hand? "python tools/make_scenes.py data/scenes" draws scenes '
    'in ADE20K layout.'
)


def datasets(
    cfg: Config, loaders: tuple[str, ...] = ('train', 'val', 'test')
) -> Iterator[ConfigDict]:
    """Dataset dicts with a data root, those inside wrappers included."""

    def walk(node: object) -> Iterator[ConfigDict]:
        if isinstance(node, dict):
            if 'data_root' in node:
                yield node
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                yield from walk(value)

    for loader in loaders:
        yield from walk(cfg.get(f'{loader}_dataloader'))


def _data_paths(dataset: ConfigDict) -> list[Path]:
    """Folders and files a dataset reads, as far as its config tells."""
    root = Path(dataset.data_root or '.')
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        paths = list(prefix.values())
    elif dataset.get('type') in ('ImageNet', 'CustomDataset'):
        paths = [prefix or dataset.get('split') or '']
    else:
        return []  # may download itself
    paths += [dataset.ann_file] if dataset.get('ann_file') else []
    return [root / path for path in paths]


def check_data(cfg: Config, *loaders: str) -> None:
    """Stop with one clear message if a dataset is not there.

    Args:
        cfg (Config): The config.
        *loaders (str): Which of 'train', 'val' and 'test' are needed.

    Raises:
        SystemExit: Naming the missing folder and what to put there.
    """
    for dataset in datasets(cfg, loaders):
        for path in _data_paths(dataset):
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                continue
            state = 'is empty' if path.is_dir() else 'does not exist'
            kind = dataset.get('type', 'dataset')
            message = (
                f'{kind}: {path} {state}.\n'
                f'{_DATASET_HELP.get(kind, "Put the dataset there.")}\n'
                f'Elsewhere on disk? Add --cfg-options '
                f'data_root=/path/to/it (now {dataset.data_root or "."}).'
            )
            if cfg.get('default_scope') == 'mmseg':
                message += f'\n{_DATASET_FALLBACK}'
            raise SystemExit(message)
        _check_suffix(dataset)


def _check_suffix(dataset: ConfigDict) -> None:
    """Stop if an image folder of mmseg's holds files of another kind only."""
    prefix = dataset.get('data_prefix') or {}
    cls = DATASETS.get(str(dataset.get('type')))
    if not isinstance(prefix, dict) or 'img_path' not in prefix or not cls:
        return
    default = inspect.signature(cls).parameters.get('img_suffix')
    suffix = dataset.get('img_suffix', default and default.default)
    folder = Path(dataset.data_root or '.') / prefix['img_path']
    if not isinstance(suffix, str) or not folder.is_dir():
        return
    if not any(folder.rglob(f'*{suffix}')):
        raise SystemExit(
            f'{dataset.type}: {folder} has no file ending in {suffix}, the '
            'dataset is empty; put images of that kind there, or set '
            'img_suffix of the dataset to theirs'
        )
