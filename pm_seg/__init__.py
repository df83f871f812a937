"""Prune-and-Merge token compression for OpenMMLab Vision Transformers.

Importing the package registers its modules with mmseg, so a config needs
``custom_imports = dict(imports=['pm_seg'])``. :func:`compress_model` does
without configs. ``pm_seg.core`` needs torch and numpy alone; without
OpenMMLab installed only that part is there.
"""

import sys
from importlib.util import find_spec

from .version import __version__

# "python -m pm_seg.env" has to speak where nothing else can be imported.
_only_env = sys.orig_argv[1:3] == ['-m', 'pm_seg.env']

if find_spec('mmseg') is not None and not _only_env:
    from .utils.quiet import quiet_imports

    with quiet_imports():
        import mmseg.datasets  # noqa: F401

        # These register their classes.
        from . import datasets, engine, models  # noqa: F401
        from .utils.checkpoints import allow_training_state, use_safe_loading

        allow_training_state()
        use_safe_loading()
        if find_spec('mmpretrain') is not None:
            from .models import classifiers  # noqa: F401
            from .models.backbones import pretrain_vit  # noqa: F401
        from .api import compress_model, make_compressible

    __all__ = ['__version__', 'compress_model', 'make_compressible']
else:
    __all__ = ['__version__']
