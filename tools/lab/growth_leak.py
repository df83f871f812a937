"""Whether memory stays what it is over many images of mixed sizes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from pm_seg.models import PMSegmenterMaskTransformerHead, PMVisionTransformer

PATCH = 16
_SHAPE = dict(embed_dims=24, num_heads=3)


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field + ':'):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {field}')


def leak_models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A tiny encoder of ours, a decoder on its groups, the paper's encoder."""
    torch.manual_seed(0)
    ours, paper = (
        PMVisionTransformer(
            img_size=64,
            patch_size=PATCH,
            num_layers=2,
            compression=compression,
            **_SHAPE,
        )
        for compression in (dict(keep=0.7), dict(type='paper'))
    )
    scores = torch.rand_like(paper.compressor.scores) + 0.01
    paper.compressor.set_scores(scores)
    decoder = PMSegmenterMaskTransformerHead(
        in_channels=24,
        channels=24,
        num_classes=5,
        num_layers=2,
        dropout_ratio=0.0,
        **_SHAPE,
    )
    return ours.eval(), decoder.eval(), paper.eval()


def leak(images: int) -> dict:
    """Memory after each of many images of mixed sizes.

    Returns:
        dict: 'mib', resident memory after each image; 'grids', how many
        different ones the images had; 'growth', MiB per 1000 images over the
        second half.
    """
    ours, decoder, paper = leak_models()
    draw = random.Random(0)
    mib, grids = [], set()
    for _ in track(
        range(images), console=Console(stderr=True), auto_refresh=False
    ):
        size = [draw.randint(33, 192) for _ in range(2)]
        grids.add(tuple(-(-n // PATCH) for n in size))
        batch = torch.rand(draw.randint(1, 3), 3, *size)
        with torch.inference_mode():
            decoder(ours(batch))
            paper(batch)
        mib.append(memory('VmRSS') / 2**20)
    half = np.array(mib[images // 2 :])
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1000
    return dict(mib=mib, grids=len(grids), growth=float(slope))
