r"""Export a model to ONNX for one image size, and check it.

From normalised images (B, 3, H, W) to class logits, with fixed B, H and W;
compared with PyTorch in onnxruntime. Exit code 1 if they differ too much.
Needs torch >= 2.5 and: pip install onnx onnxscript onnxruntime.

examples:
  # the config's image size, one image at a time
  python tools/export_onnx.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --out pm.onnx
  # another size, logits of the patch grid
  python tools/export_onnx.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --out pm.onnx --size 384 640 --logits patches
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ..utils.files import whole_files
from .arguments import add_config, add_size, make_parser, output_file
from .config import load_config, load_model
from .ending import command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('export_onnx.py', __doc__)
    add_config(parser)
    add = parser.add_argument
    add('checkpoint', help='that fits the config')
    add('--out', type=output_file, required=True, help='.onnx file to write')
    add_size(parser)
    add('--batch-size', type=int, default=1, help='images at once (default 1)')
    add(
        '--logits',
        choices=('image', 'patches'),
        default='image',
        help='segmentation logits at the size of the image (default) or of '
        'the patch grid',
    )
    add(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest difference of logits to accept (default 1e-3)',
    )
    return parser.parse_args(argv)


class Predictor(nn.Module):
    """Normalised images to class logits."""

    def __init__(self, model: nn.Module, resize: bool) -> None:
        super().__init__()
        self.model = model
        self.resize = resize

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images, mode='tensor')
        if self.resize and logits.dim() == 4:
            logits = nn.functional.interpolate(
                logits,
                size=images.shape[2:],
                mode='bilinear',
                align_corners=self.model.align_corners,
            )
        return logits


def has_exporter() -> bool:
    """Whether torch has the exporter to ONNX that came with torch 2.5."""
    return 'external_data' in inspect.signature(torch.onnx.export).parameters


def check_exporter() -> None:
    """Stop if torch is too old, naming the version that is needed."""
    if not has_exporter():
        raise SystemExit(
            f'torch {torch.__version__} cannot write these models as ONNX: '
            'the exporter came with torch 2.5; please update torch for this'
        )


def export(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a model on the CPU, in evaluation mode, for inputs of the shape of
    ``images``, (B, 3, H, W), or nothing."""
    # Its optimiser names every operator that it leaves as it is.
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    with whole_files(path) as (partial,), torch.no_grad():
        model(images)  # the paper's form derives the maps of this size
        torch.onnx.export(
            model,
            (images,),
            str(partial),
            input_names=['images'],
            output_names=['logits'],
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def open_session(path: Path) -> Any:
    """A model in onnxruntime, on the CPU, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Sessions that wait for their turn must not keep the cores busy.
    spinning = 'session.intra_op.allow_spinning'
    options.add_session_config_entry(spinning, '0')
    return onnxruntime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider']
    )


def compare(model: nn.Module, images: Tensor, path: Path) -> float:
    """Largest difference between onnxruntime and PyTorch."""
    session = open_session(path)
    (found,) = session.run(None, {'images': images.numpy()})
    with torch.no_grad():
        expected = model(images).numpy()
    return float(np.abs(found - expected).max())


@command('No model was written.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/export_onnx.py``."""
    args = parse_args(argv)
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        sys.exit(f'{error}; pip install onnx onnxscript onnxruntime')
    check_exporter()
    cfg = load_config(args)
    model, _ = load_model(cfg.model, args.checkpoint)
    size = to_2tuple(args.size or model.backbone.img_size)
    predictor = Predictor(model, args.logits == 'image').eval()
    images = torch.rand(args.batch_size, 3, *size) * 2 - 1
    export(predictor, images, args.out)
    worst = compare(predictor, images, args.out)
    operators = {node.op_type for node in onnx.load(args.out).graph.node}
    print(
        f'Wrote {args.out}: {tuple(images.shape)} -> logits, '
        f'{len(operators)} kinds of operators, '
        f'{args.out.stat().st_size / 2**20:.1f} MiB; onnxruntime differs from '
        f'PyTorch by at most {worst:.1e}'
    )
    if worst > args.tolerance:
        sys.exit(f'That is more than --tolerance {args.tolerance}')
