"""Which tokens matter, and which differ, from what they look like to a layer.

The paper scores positions by gradient-weighted attention, averaged over images
(:mod:`~pm_seg.core.scores`). For groups that follow the image the same score
is predicted from the token itself, by ridge regression on the normed token::

    log score(x) ~ <direction, layer_norm(x)> + constant of the image

Pairs of important tokens then merge later: their dissimilarity is multiplied
by both scores to the power of a strength. Similar are tokens that are alike in
the principal components of normed tokens, found on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scores import GradientWatcher, value_gradient_scores
from .similarity import COMPONENTS

_FLOOR = 1e-4  # of the image's mean score: silent tokens have a logarithm too


def predicted_scores(normed: Tensor, direction: Tensor) -> Tensor:
    """Of normed patch tokens (B, T, C), float32, (B, T), 1 in the geometric
    mean of an image; by a direction of the fitter times a strength, (C,)."""
    score = (normed * direction).sum(2)
    return (score - score.mean(1, keepdim=True)).exp()


class ImportanceFitter(GradientWatcher):
    """Gathers what the regression needs while losses are back-propagated.

    Use as a context manager around ``loss.backward()`` calls of the
    uncompressed model::

        with ImportanceFitter(blocks, taps, num_prefix=1, dims=384) as fitter:
            for images, labels in batches:
                loss_fn(model(images), labels).backward()
        directions, components = fitter.directions(), fitter.components()
        compressor.learn(directions, components)
        compressor.set_strength(0.1)

    Args:
        blocks (Sequence[nn.Module]): The layers; their first argument are
            tokens (B, P+N, C).
        taps (Sequence[nn.Module]): See
            :class:`~pm_seg.core.scores.GradientWatcher`.
        num_prefix (int): P.
        dims (int): C.
        ridge (float): Added to the diagonal of the Gram matrix, as a share
            of its mean. Defaults to 0.01.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        taps: Sequence[nn.Module],
        num_prefix: int,
        dims: int,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(taps)
        self.blocks = blocks
        self.num_prefix = num_prefix
        self.ridge = ridge
        self.gram = torch.zeros(len(blocks), dims, dims, dtype=torch.float64)
        self.cross = torch.zeros(len(blocks), dims, dtype=torch.float64)
        self._inputs: dict[int, Tensor] = {}

    def __enter__(self) -> ImportanceFitter:
        for layer, block in enumerate(self.blocks):
            keep = partial(self._keep, layer)
            self.enter_context(block.register_forward_pre_hook(keep))
        self.callback(self._inputs.clear)
        return super().__enter__()

    def _keep(self, layer: int, block: nn.Module, args: Sequence) -> None:
        self._inputs[layer] = args[0].detach()

    @torch.no_grad()
    def _record(self, layer: int, value: Tensor, grad: Tensor) -> None:
        x = self._inputs[layer]
        score = value_gradient_scores(value, grad)[:, self.num_prefix :].abs()
        score = score + _FLOOR * score.mean(1, keepdim=True)
        # An image without gradients has nothing to say.
        wanted = score.clamp_min(torch.finfo(torch.float64).tiny).log()
        wanted = wanted - wanted.mean(1, keepdim=True)
        known = x[:, self.num_prefix :].float()
        known = F.layer_norm(known, known.shape[2:]).double()
        known = known - known.mean(1, keepdim=True)
        known, wanted = known.flatten(0, 1), wanted.flatten()
        self.gram[layer] += (known.T @ known).cpu()
        self.cross[layer] += (known.T @ wanted).cpu()

    def directions(self) -> Tensor:
        """Solutions of all layers, float32, (L, C).

        Raises:
            RuntimeError: If a layer saw no gradient.
        """
        scale = self.gram.diagonal(dim1=1, dim2=2).mean(1)
        self._require_gradients(scale)
        eye = torch.eye(self.gram.shape[1], dtype=self.gram.dtype)
        gram = self.gram + self.ridge * scale[:, None, None] * eye
        # Batches of torch.linalg.solve fail on several threads in torch 2.14.
        factor = torch.linalg.cholesky(gram)
        solved = torch.cholesky_solve(self.cross.unsqueeze(2), factor)
        return solved.squeeze(2).float()

    def components(self) -> Tensor:
        """Directions in which the normed tokens of an image differ most, of
        all layers, orthonormal, float32, (L, C, D), D = min(32, C)."""
        _, vectors = torch.linalg.eigh(self.gram)
        return vectors[..., -COMPONENTS:].float()
