"""mmpretrain's Vision Transformers with token compression."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from mmengine.logging import print_log
from mmengine.utils import to_2tuple
from mmpretrain.models.backbones import (
    DistilledVisionTransformer,
    VisionTransformer,
)
from mmpretrain.models.backbones.vision_transformer import (
    TransformerEncoderLayer,
)
from mmpretrain.models.utils import resize_pos_embed
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ...core import CLASSIFICATION
from ...core.merging import Grid
from ..compressible import (
    CompressibleMixin,
    check_arguments,
    check_out_indices,
    check_patches,
)
from ..layers import fused_attention, mean_keys, run_halves

_OUTPUT_NORMS = ('ln1.', 'ln2.')


class PMPretrainEncoderLayer(TransformerEncoderLayer):
    """mmpretrain's encoder layer in the two halves compressors call.

    Parameters and results are those of the base class.

    Args:
        with_cp (bool): Whether to compute activations again in the backward
            pass instead of keeping them. Defaults to False.
        **kwargs: Arguments of the base class.
    """

    def __init__(self, *args, with_cp: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp
        self.attn.value_tap = nn.Identity()

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        """See :class:`~pm_seg.core.Layer`."""
        attn = self.attn
        out = fused_attention(
            attn.qkv(self.ln1(x)),
            attn.num_heads,
            attn.value_tap,
            log_size,
            attn.attn_drop if self.training else 0.0,
        )
        return x + attn.out_drop(attn.gamma1(attn.proj_drop(attn.proj(out))))

    def feed_forward(self, x: Tensor) -> Tensor:
        """See :class:`~pm_seg.core.Layer`."""
        return self.ffn(self.ln2(x), identity=x)

    def mean_keys(self, x: Tensor) -> Tensor:
        """See :class:`~pm_seg.core.Layer`."""
        qkv = self.attn.qkv
        return mean_keys(
            self.ln1(x), qkv.weight, qkv.bias, self.attn.num_heads
        )

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        """Run the layer, see :class:`~pm_seg.core.Layer`."""
        return run_halves(self, x, log_size)


class PretrainMixin(CompressibleMixin):
    """For backbones of mmpretrain: from tokens to what they return."""

    default_compression = CLASSIFICATION

    @property
    def reads_prefix(self) -> bool:
        """See :class:`~pm_seg.models.compressible.CompressibleMixin`."""
        return self.out_type == 'cls_token'

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images to tokens.

        Args:
            images (Tensor): (B, 3, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens (B, P+N, C), and the grid
            (h, w) of the N patch tokens.
        """
        raise NotImplementedError

    def rotary_table(self, grid: Grid) -> Tensor | None:
        """Of the patch tokens, (N, 2D), None if positions do not rotate."""

    def forward(self, x: Tensor) -> tuple:
        """Extract features.

        Args:
            x (Tensor): Images (B, 3, H, W), any H and W.

        Returns:
            tuple: For each of ``out_indices``, by ``out_type``: (B, P+N, C)
            for 'raw', (B, C, h, w) for 'featmap', else (B, C).
        """
        x, grid = self.embed(x)
        outs = self.run_layers(
            x, grid, self.out_indices, self.rotary_table(grid)
        )
        collected, last = outs.layers, len(self.layers) - 1
        if self.final_norm and last in collected:
            collected[last] = self.ln1(collected[last])
        return tuple(
            self._format_output(collected[index], grid)
            for index in sorted(collected)
        )

    def train(self, mode: bool = True) -> PretrainMixin:
        super().train(mode)  # returns nothing
        return self

    def _resized_positions(self, grid: Grid, num_extra: int) -> Tensor:
        return resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            grid,
            mode=self.interpolate_mode,
            num_extra_tokens=num_extra,
        )

    def _adapt_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> None:
        super()._adapt_state_dict(state_dict, prefix)
        # The stock class would resize after the check; what it cannot resize
        # is reported there.
        if self.pos_embed is not None:
            with suppress(AssertionError):
                self._prepare_pos_embed(state_dict, prefix)


@MODELS.register_module()
class PMVisionTransformer(PretrainMixin, VisionTransformer):
    """mmpretrain's ``VisionTransformer`` with token compression.

    Takes all arguments of :class:`mmpretrain.models.VisionTransformer`, has
    the same checkpoint keys and, with ``compression=None``, gives the same
    results. Modifications:

    - with ``compression``, layers run on merged patch tokens; outputs 'raw'
      and 'featmap' still hold all patches;
    - loading a checkpoint whose weights are missing, unexpected or of another
      shape raises ``RuntimeError`` and names them. Position embeddings of
      another size are resized, as in the base class;
    - ``init_cfg=dict(type='Pretrained', ...)`` accepts a checkpoint of a
      whole classifier; output norms that it lacks (pre-training has none for
      ``out_type='avg_featmap'``) keep their initial values;
    - ``layer_cfgs=dict(with_cp=True)`` turns on activation checkpointing.

    Args:
        compression (dict, optional): ``type`` 'pm' (default), 'paper',
            'tome' or 'algm' and the options of its class in
            :mod:`pm_seg.core`, for example ``dict(keep=0.6)``. None is the
            dense model. Defaults to None.
        **kwargs: See the base class; by keyword from the fourth on.

    Raises:
        ValueError: On an unknown ``arch``, layers out of range or unknown
            ``compression``.

    Example:
        >>> model = dict(
        ...     backbone=dict(
        ...         type='PMVisionTransformer',
        ...         arch='deit-small',
        ...         compression=dict(keep=0.6)))
    """

    def __init__(
        self,
        arch: str | dict = 'base',
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        *,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        layer_scale_init_value: float | Tensor = 0.0,
        layer_cfgs: dict | Sequence[dict] | None = None,
        compression: dict | None = None,
        **kwargs,
    ) -> None:
        settings = self._arch_settings(arch)
        depth = settings['num_layers']
        norm_cfg = norm_cfg or dict(type='LN', eps=1e-6)
        check_patches(to_2tuple(img_size), to_2tuple(patch_size))
        check_arguments(self, VisionTransformer, kwargs)
        # The base class builds everything but the layers.
        super().__init__(
            arch={**settings, 'num_layers': 0},
            img_size=img_size
            if isinstance(img_size, int)
            else tuple(img_size),
            patch_size=patch_size,
            out_indices=0,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            frozen_stages=-1,
            **kwargs,
        )
        self.arch_settings, self.num_layers = settings, depth
        self.out_indices = check_out_indices(out_indices, depth)
        if not isinstance(layer_cfgs, Sequence):
            layer_cfgs = [layer_cfgs or {}] * depth
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        for rate, layer_cfg in zip(rates, layer_cfgs):
            options = dict(
                embed_dims=self.embed_dims,
                num_heads=settings['num_heads'],
                feedforward_channels=settings['feedforward_channels'],
                layer_scale_init_value=layer_scale_init_value,
                drop_rate=drop_rate,
                drop_path_rate=rate,
                qkv_bias=qkv_bias,
                norm_cfg=norm_cfg,
            )
            self.layers.append(
                PMPretrainEncoderLayer(**{**options, **layer_cfg})
            )
        height, width = self.patch_resolution
        self.build_compressor(
            compression, (height, width), self.num_extra_tokens
        )
        self.frozen_stages = frozen_stages
        if frozen_stages > 0:
            self._freeze_stages()

    def _arch_settings(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ValueError(
                    f'arch={arch!r} is unknown; choose one of '
                    f'{sorted(self.arch_zoo)} or give a dict'
                )
            return self.arch_zoo[arch.lower()]
        needed = {
            'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels',
        }  # fmt: skip
        if not needed <= set(arch):
            raise ValueError(
                f'arch={dict(arch)} lacks {sorted(needed - set(arch))}'
            )
        return dict(arch)

    @property
    def own_keys(self) -> tuple[str, ...]:
        keys = ('layers.', 'compressor.', 'patch_embed.', 'pos_embed')
        # As in the base class, a model without cls token takes the
        # checkpoint of one that has it.
        tokens = ('cls_token', 'dist_token') if self.with_cls_token else ()
        return keys + tokens

    def prefix_tokens(self) -> list[Tensor]:
        """Tokens in front of the patches, each (1, 1, C)."""
        return [] if self.cls_token is None else [self.cls_token]

    def _all_tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        check_patches(
            images.shape[2:], self.patch_embed.projection.kernel_size
        )
        x, (height, width) = self.patch_embed(images)
        prefix = [t.expand(len(x), -1, -1) for t in self.prefix_tokens()]
        x = torch.cat([*prefix, x], dim=1)
        grid = int(height), int(width)
        x = x + self._resized_positions(grid, self.num_extra_tokens)
        return self.drop_after_pos(x), grid

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = self._all_tokens(images)
        return self.pre_norm(x), grid

    def init_weights(self) -> None:
        """Initialise, or load ``init_cfg=dict(type='Pretrained', ...)``."""
        if not self.load_pretrained():
            super().init_weights()

    def _fit_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        missing = {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith(_OUTPUT_NORMS) and key not in state_dict
        }
        if missing:
            print_log(
                f'Not in the pretrained weights, kept as initialised: '
                f'{", ".join(missing)}',
                logger='current',
            )
        state_dict.update(missing)

    def _shape_remedy(self, key: str) -> str:
        if key == 'pos_embed':
            return (
                f'; it cannot be resized: {self.num_extra_tokens} prefix '
                'tokens and a square grid of patches are expected. Two prefix '
                'tokens are those of PMDistilledVisionTransformer'
            )
        return super()._shape_remedy(key)


@MODELS.register_module()
class PMDistilledVisionTransformer(
    PMVisionTransformer, DistilledVisionTransformer
):
    """mmpretrain's ``DistilledVisionTransformer`` with token compression.

    See :class:`PMVisionTransformer`; modifications:

    - two prefix tokens, cls and dist, and both of them as the output with
      ``out_type='cls_token'``;
    - as in the base class, ``pre_norm`` is built but not applied.

    Args:
        arch (str | dict): Defaults to 'deit-base'.
        **kwargs: See :class:`PMVisionTransformer`.
    """

    def __init__(self, arch: str | dict = 'deit-base', **kwargs) -> None:
        super().__init__(arch=arch, **kwargs)

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token, self.dist_token]

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        return self._all_tokens(images)
