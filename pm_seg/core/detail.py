"""Fitting the detail path of token maps.

Merged tokens share one update of a block; what they would have got each of
them alone differs. On average over tokens and images most of that difference
is a linear function of how a token differs from its group,

    block(x_n) - x_n - (y_g(n) - z_g(n))  ~  U D (x_n - z_g(n)),

with a matrix of low rank. It is fitted by ridge regression on the tokens of
the dense model, layer by layer in one pass, without labels. Of the full
solution A the R directions that explain most of the predictions are kept
(reduced-rank regression): ``U D = A V V^T`` with the leading eigenvectors V
of ``A^T G A``, G the Gram matrix of the differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .compressor import TokenCompressor
from .token_map import ImageMap, TokenMap


class DetailFitter:
    """Gathers what the fit needs while the dense model runs.

    Use as a context manager around forward passes of the uncompressed
    model::

        with DetailFitter(compressor, layers) as fitter:
            for images in batches:
                model(images)
        fitter.fit()

    Args:
        compressor (TokenCompressor): With a structure and a detail path.
        layers (Sequence[nn.Module]): The transformer's layers.
        ridge (float): Added to the diagonal of G, as a share of its mean.
            Defaults to 0.01.
    """

    def __init__(
        self,
        compressor: TokenCompressor,
        layers: Sequence[nn.Module],
        ridge: float = 0.01,
    ) -> None:
        compressor.reset_detail()
        self.compressor = compressor
        self.layers = layers
        self.ridge = ridge
        self.stages = [
            stage
            for stage in compressor.stages(compressor.grid)
            if stage.token_map is not None
        ]
        size = (len(self.stages), compressor.dims, compressor.dims)
        self.gram = torch.zeros(size, dtype=torch.float64)
        self.cross = torch.zeros(size, dtype=torch.float64)
        self._inputs: dict[int, Tensor] = {}
        self._muted = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> DetailFitter:
        for index, stage in enumerate(self.stages):
            first = self.layers[stage.layers[0]]
            last = self.layers[stage.layers[-1]]
            self._handles += [
                first.register_forward_pre_hook(
                    lambda module, args, index=index: self._enter(
                        index, args[0]
                    )
                ),
                last.register_forward_hook(
                    lambda module, args, out, index=index: self._leave(
                        index, out
                    )
                ),
            ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    @contextmanager
    def _mute(self) -> Iterator[None]:
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def _enter(self, index: int, x: Tensor) -> None:
        if not self._muted:
            self._inputs[index] = x

    @torch.no_grad()
    def _leave(self, index: int, out: Tensor) -> None:
        if self._muted:
            return
        stage, x = self.stages[index], self._inputs.pop(index)
        token_map = stage.token_map.bind(x)
        merged = updated = token_map.merge(x)
        with self._mute():
            for layer in stage.layers:
                updated = self.layers[layer](updated)
        update = token_map.restore(x, merged, updated) - x
        known = x - token_map.spread(merged)
        wanted = out - x - update
        known, wanted = (self._patches(t, token_map) for t in (known, wanted))
        self.gram[index] += (known.T @ known).double().cpu()
        self.cross[index] += (known.T @ wanted).double().cpu()

    def _patches(self, x: Tensor, token_map: TokenMap | ImageMap) -> Tensor:
        """Merged patch tokens of all images, (tokens, C)."""
        prefix = self.compressor.num_prefix
        x = x[:, prefix:]
        if token_map.live is not None:
            x = x[:, token_map.live[prefix:]]
        return x.flatten(0, 1).float()

    @torch.no_grad()
    def fit(self) -> None:
        """Set the detail path of every token map.

        Raises:
            RuntimeError: If no image was seen.
        """
        compressor, rank = self.compressor, self.compressor.detail
        for stage, gram, cross in zip(self.stages, self.gram, self.cross):
            scale = gram.diagonal().mean()
            if scale == 0:
                raise RuntimeError(
                    f'layer {stage.layers[0]} saw no merged tokens; run the '
                    'uncompressed model on images inside the with block'
                )
            eye = torch.eye(len(gram), dtype=gram.dtype)
            full = torch.linalg.solve(gram + self.ridge * scale * eye, cross)
            explained = full.T @ gram @ full
            _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
            leading = vectors[:, -rank:]
            down, up = full @ leading, leading.T
            # Both of the same size: both are trained at the same rate.
            root = down.norm(dim=0).clamp_min(1e-12).sqrt()
            compressor.detail_down[stage.layers[0]] = down / root
            compressor.detail_up[stage.layers[0]] = up * root[:, None]
