"""Whether the datasets of a config are there, before work starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmseg.registry import DATASETS

_CLASSES = (
    'Put a folder of pictures for each class there; or pictures and the '
    'annotation file the config names.'
)
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
    'ImageNet': _CLASSES,
    'CustomDataset': _CLASSES,
}


def datasets(cfg: Config, *loaders: str) -> Iterator[ConfigDict]:
    """Dataset dicts of loaders with a data root, also inside wrappers."""
    nodes = [cfg.get(f'{loader}_dataloader') for loader in loaders]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, dict):
            if 'data_root' in node:
                yield node
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            nodes[:0] = node


def _data_paths(dataset: ConfigDict) -> Iterator[tuple[Path, str]]:
    """Folders and files a dataset reads, and suffixes of files, '' for any."""
    root, kind = Path(dataset.data_root or '.'), str(dataset.get('type'))
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        cls = DATASETS.get(kind)
        default = cls and inspect.signature(cls).parameters.get('img_suffix')
        suffix = dataset.get('img_suffix', default and default.default)
        for name, path in prefix.items():
            images = name == 'img_path' and isinstance(suffix, str)
            yield root / path, suffix if images else ''
    elif kind in ('ImageNet', 'CustomDataset'):
        yield root / (prefix or dataset.get('split') or ''), ''
    else:
        return  # may download itself
    if dataset.get('ann_file'):
        yield root / dataset.ann_file, ''


def check_data(cfg: Config, *loaders: str) -> None:
    """Stop if a dataset of 'train', 'val' or 'test' is not there, naming the
    missing folder and what to put there."""
    for dataset in datasets(cfg, *loaders):
        for path, suffix in _data_paths(dataset):
            if path.is_file() or any(path.rglob(f'*{suffix}')):
                continue
            state = 'does not exist'
            if path.is_dir():
                wanted = f': no file ending in {suffix} (img_suffix)'
                state = f'is empty{wanted if suffix else ""}'
            kind = dataset.get('type', 'dataset')
            message = (
                f'{kind}: {path} {state}.\n'
                f'{_DATASET_HELP.get(kind, "Put the dataset there.")}\n'
                f'Elsewhere on disk? Add --cfg-options '
                f'data_root=/path/to/it (now {dataset.data_root or "."}).'
            )
            if cfg.get('default_scope') == 'mmseg':
                message += (
                    '\nNo data at hand? "python tools/make_scenes.py '
                    'data/scenes" draws scenes in ADE20K layout.'
                )
            raise SystemExit(message)
