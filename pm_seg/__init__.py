"""Prune-and-Merge token compression for OpenMMLab Vision Transformers.

Importing the package registers its modules with mmseg, so a config needs
``custom_imports = dict(imports=['pm_seg'])``. ``pm_seg.core`` needs torch
and numpy alone; without OpenMMLab installed only that part is there.
"""

import warnings
from importlib.util import find_spec

from .version import __version__

if find_spec('mmseg') is not None:
    with warnings.catch_warnings():
        # mmcv without compiled operators; pm_seg needs none.
        warnings.filterwarnings('ignore', message='Fail to import')
        # These register their classes.
        from . import datasets, engine, models  # noqa: F401
        from .utils.checkpoints import allow_training_state, use_safe_loading

        allow_training_state()
        use_safe_loading()
        if find_spec('mmpretrain') is not None:
            from .models import classifiers  # noqa: F401
            from .models.backbones import pretrain_vit  # noqa: F401

__all__ = ['__version__']
