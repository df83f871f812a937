"""What a compressed model makes of one image, and pictures of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.utils import to_2tuple
from torch import Tensor

from ..core import GroupRecorder
from ..engine.scoring import (
    compressible_modules,
    evaluating,
    require_compressible,
    uncompressed,
)
from .figures import panel_figure, ranking_figure
from .panels import (
    CHANGED,
    JUDGED,
    Panel,
    draw_difference,
    group_panel,
    make_palette,
    paint_labels,
)

TOP = 5
_MAX_LEGEND = 14


@dataclass(frozen=True)
class Inspection:
    """One image, dense and compressed.

    Methods take ``classes`` and ``palette`` of the dataset as ``meta``; both
    may be missing.

    Attributes:
        name (str): Of the image file, without folder and suffix.
        image (np.ndarray): What the model sees, RGB, uint8, (H, W, 3); the
            middle crop of slide inference.
        groups (dict[str, list[np.ndarray]]): Group of each token, (h, w), by
            layer, by name of the module.
        patch (int): Side of a token in pixels.
        original (np.ndarray): The whole image, RGB, uint8.
        dense, compressed (np.ndarray): Classes of the pixels of the whole
            image, (H, W), or probabilities of the classes, (classes,).
        truth (np.ndarray, optional): The annotation: classes of the pixels,
            or numbers of the right classes.
    """

    name: str
    image: np.ndarray
    groups: dict[str, list[np.ndarray]]
    patch: int
    original: np.ndarray
    dense: np.ndarray
    compressed: np.ndarray
    truth: np.ndarray | None = None

    @property
    def classifies(self) -> bool:
        """Whether the model says one class for the image, not a map."""
        return self.dense.ndim == 1

    def group_panels(self) -> list[Panel]:
        """The groups of every layer of every module over the image."""
        return [
            group_panel(f'{name} {index}', self.image, group, self.patch)
            for name, layers in self.groups.items()
            for index, group in enumerate(layers)
        ]

    def prediction_panels(self, meta: dict) -> list[Panel]:
        """Image, annotation if there is one, both segmentations and their
        difference; of a classifier the image."""
        if self.classifies:
            return [Panel('image', self.image)]
        maps = dict(dense=self.dense, compressed=self.compressed)
        if self.truth is not None:
            maps = {'annotation': self.truth, **maps}
        palette = self._palette(meta)
        share = (self.dense != self.compressed).mean()
        difference = draw_difference(
            self.original, self.dense, self.compressed, self.truth
        )
        return [
            Panel('image', self.original),
            *(Panel(k, paint_labels(m, palette)) for k, m in maps.items()),
            Panel(f'difference: {share:.1%} of the pixels', difference),
        ]

    def _palette(self, meta: dict) -> list[Sequence[int]]:
        """Colours of all classes, our own where the dataset has too few."""
        least = int(max(self.dense.max(), self.compressed.max())) + 1
        palette = list(meta.get('palette') or ())
        if len(palette) >= least:
            return palette
        return make_palette(max(least, len(meta.get('classes') or ())))

    def legend(self, meta: dict) -> dict[str, tuple[float, ...]]:
        """Colours of the largest classes of a segmentation."""
        palette = self._palette(meta)
        maps = [self.dense, self.compressed]
        maps += [] if self.truth is None else [self.truth]
        values, counts = np.unique(np.stack(maps), return_counts=True)
        largest = values[np.argsort(-counts)]
        largest = largest[largest < len(palette)][:_MAX_LEGEND]
        names = class_names(meta, len(palette))
        return {
            names[i]: tuple(np.array(palette[i]) / 255)
            for i in sorted(largest)
        }

    @property
    def changes(self) -> dict[str, str]:
        """Colours of the differences of a segmentation."""
        return CHANGED if self.truth is None else JUDGED

    def ranking(self, meta: dict) -> list[tuple[str, float, float]]:
        """Name and both probabilities of the classes that either classifier
        has among its best, in the order of the dense one. Names say what is
        right."""
        both = np.stack([self.dense, self.compressed])
        best = np.unique(np.argsort(-both)[:, :TOP])
        names = class_names(meta, len(self.dense))
        for i in () if self.truth is None else self.truth:
            names[i] += ' (right)'
        return [
            (names[i], float(self.dense[i]), float(self.compressed[i]))
            for i in sorted(best, key=lambda i: -self.dense[i])
        ]

    def figures(self, meta: dict) -> dict[str, Figure]:
        """'groups' and 'prediction', to be saved."""
        if self.classifies:
            prediction = ranking_figure(self.image, self.ranking(meta))
        else:
            panels = self.prediction_panels(meta)
            colours = {**self.legend(meta), **self.changes}
            prediction = panel_figure(panels, len(panels), colours)
        groups = panel_figure(self.group_panels())
        return dict(groups=groups, prediction=prediction)


def class_names(meta: dict, count: int) -> list[str]:
    """Names of the classes; their numbers where there are none."""
    names = list(meta.get('classes') or ())[:count]
    # Synonyms ('tench, Tinca tinca') are too long for a picture.
    short = [str(name).split(',')[0] for name in names]
    return short + [f'class {i}' for i in range(len(short), count)]


def _datasets(cfg: Config, *loaders: str) -> Iterator[dict]:
    """Datasets of loaders, inside wrappers that repeat or join them."""
    for loader in loaders:
        dataset = (cfg.get(f'{loader}_dataloader') or {}).get('dataset')
        while dataset and dataset.get('dataset'):
            dataset = dataset['dataset']
        if dataset:
            yield dataset


def dataset_meta(cfg: Config, saved: dict | None = None) -> dict:
    """Class names and palette of a config's dataset, or what a checkpoint
    says of them."""
    meta = (saved or {}).get('meta', {}).get('dataset_meta')
    if meta and meta.get('classes'):
        return meta
    for dataset in _datasets(cfg, 'test', 'val', 'train'):
        cls = dataset.get('type')
        if isinstance(cls, str):
            with DATASETS.switch_scope_and_registry(None) as registry:
                cls = registry.get(cls)
        known = getattr(cls, 'METAINFO', None) or {}
        meta = {**known, **(dataset.get('metainfo') or {})}
        if meta.get('classes'):
            return meta
    return {}


def test_pipeline(cfg: Config) -> Compose:
    """The transforms of testing, for images without annotation.

    Raises:
        ValueError: If the config has no test data loader.
    """
    for dataset in _datasets(cfg, 'test', 'val'):
        if dataset.get('pipeline'):
            steps = copy.deepcopy(dataset['pipeline'])
            return Compose(
                [s for s in steps if s['type'] != 'LoadAnnotations']
            )
    raise ValueError(
        'the config has no test_dataloader whose dataset has a pipeline; it '
        'is needed to prepare images as in testing'
    )


def require_structure(model: BaseModel) -> None:
    """Raise ``ValueError`` unless the model can run compressed."""
    for name, module in require_compressible(model).items():
        if not module.compressor.has_structure:
            raise ValueError(
                f'{name} has no token groups yet: the checkpoint is a dense '
                'one. Compress it first: python tools/compress.py CONFIG '
                'CHECKPOINT --out pm.pth'
            )


@torch.no_grad()
def inspect(
    model: BaseModel, sample: dict, dense_model: BaseModel | None = None
) -> Inspection:
    """Run a compressed model on one image and look inside.

    Args:
        model (BaseModel): A compressed mmseg or mmpretrain model, not
            wrapped.
        sample (dict): What :func:`test_pipeline` or an item of a validation
            dataset gives.
        dense_model (BaseModel, optional): What to compare with. Defaults to
            the same weights with compression off.
    """
    data = pseudo_collate([sample])
    with evaluating(model), ExitStack() as stack:
        prepared = model.data_preprocessor(copy.copy(data), training=False)
        size = prepared['inputs'].shape[2:]
        crop = _middle(model, size)
        recorders = {
            name or type(module).__name__: stack.enter_context(
                GroupRecorder(module.compressor)
            )
            for name, module in compressible_modules(model).items()
        }
        model(prepared['inputs'][(..., *crop)], mode='tensor')
    compressed = _predict(model, data)
    if dense_model is None:
        with uncompressed(model):
            dense = _predict(model, data)
    else:
        dense = _predict(dense_model, data)
    seen = _pixels(sample['inputs'], size)
    annotated, truth = sample['data_samples'], None
    if dense.ndim == 1 and 'gt_label' in annotated:
        truth = annotated.gt_label.cpu().numpy().reshape(-1)
    elif 'gt_sem_seg' in annotated:
        truth = annotated.gt_sem_seg.data[0].cpu().numpy()
        truth = truth if truth.shape == dense.shape else None
    path = annotated.metainfo.get('img_path')
    original = mmcv.imread(path, channel_order='rgb') if path else seen
    if dense.ndim == 2 and original.shape[:2] != dense.shape:
        original = mmcv.imresize(original, dense.shape[::-1])
    return Inspection(
        name=Path(path or 'image').stem,
        image=seen[crop],
        groups={
            name: [group[0].view(x.grid).numpy() for group in x.groups]
            for name, x in recorders.items()
        },
        patch=to_2tuple(getattr(model.backbone, 'patch_size', 16))[0],
        original=original,
        dense=dense,
        compressed=compressed,
        truth=truth,
    )


def _predict(model: BaseModel, data: dict) -> np.ndarray:
    """Classes of the pixels, (H, W), or probabilities of the classes."""
    with evaluating(model):
        result = model.test_step(copy.deepcopy(data))[0]
    if 'pred_sem_seg' in result:
        return result.pred_sem_seg.data[0].cpu().numpy()
    return result.pred_score.float().cpu().numpy()


def _middle(model: BaseModel, size: Sequence[int]) -> tuple[slice, ...]:
    """The middle crop of slide inference, or the whole image."""
    test_cfg = getattr(model, 'test_cfg', None) or {}
    slides = test_cfg.get('mode') == 'slide'
    wanted = to_2tuple(test_cfg['crop_size']) if slides else size
    starts = [max(total - part, 0) // 2 for total, part in zip(size, wanted)]
    return tuple(slice(s, s + part) for s, part in zip(starts, wanted))


def _pixels(inputs: Tensor, size: Sequence[int]) -> np.ndarray:
    """A sample's image, BGR (3, H, W), as RGB (H', W', 3), padded."""
    image = inputs.flip(0).permute(1, 2, 0).cpu().numpy()
    if image.dtype != np.uint8:  # normalised in the pipeline already
        low, high = image.min(), image.max()
        image = ((image - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    return mmcv.impad(image, shape=size)
