"""timm's models, compressed by one call."""

from __future__ import annotations

import pytest
import torch
from compressing import FEW, ONE, check, images, timm_model
from torch import nn

import pm_seg


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vit_tiny_patch16_224', {}),
        ('vit_tiny_patch16_224', dict(reg_tokens=2, init_values=0.1)),
        (
            'vit_tiny_patch16_224',
            dict(global_pool='avg', class_token=False, qk_norm=True),
        ),
        ('deit_tiny_distilled_patch16_224', {}),
    ],
)
def test_timm(name: str, options: dict) -> None:
    model = timm_model(name, **options)
    batches = [(images(), torch.arange(4)), (images(), torch.arange(4))]
    small = pm_seg.compress_model(model, batches, keep=0.8, measuring=FEW)
    x = images()
    check(model, small, lambda m: m(x))
    check(model, small, lambda m: m.forward_features(x))
    features = small.forward_features(x)
    assert torch.equal(small.forward_head(features), small(x))
    small.train()(x).sum().backward()
    assert small.patch_embed.proj.weight.grad.abs().max() > 0


def test_timm_works_at_once_and_loads() -> None:
    model = timm_model()
    small = pm_seg.compress_model(model, keep=0.8, progress=False)
    again = pm_seg.make_compressible(timm_model(), keep=0.9)
    # The dense checkpoint loads too, and runs compressed.
    again.load_state_dict(model.state_dict(), strict=True)
    x = images()
    assert not torch.equal(again(x), small(x))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    scripted = torch.jit.trace(small, x)
    torch.testing.assert_close(scripted(x), small(x))


def test_timm_scores_are_those_of_the_formula() -> None:
    """sum_q A dL/dA of an explicit attention map, in double precision."""
    model = timm_model().double()
    x, labels = images().double(), torch.arange(4)
    small = pm_seg.compress_model(
        model, [(x, labels)], measuring=ONE, type='paper'
    )
    attention = model.blocks[1].attn
    maps = []

    def explicit(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        qkv = attention.qkv(tokens).unflatten(-1, (3, 3, 8))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * attention.scale).softmax(-1)
        weights.retain_grad()
        maps.append(weights)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return attention.proj(out)

    attention.forward = explicit
    nn.functional.cross_entropy(model(x), labels).backward()
    score = (maps[0] * maps[0].grad).sum((1, 2))[:, 1:].abs()
    expected = score.sum(0) / (3 * 17)
    got = small.blocks.compressor.scores[1]
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=0)


def test_timm_without_labels_uses_its_own_predictions() -> None:
    model = timm_model()
    x = images()
    own = model(x).argmax(-1)
    one, two, other = (
        pm_seg.compress_model(model, [batch], keep=0.8, measuring=ONE)
        for batch in (x, (x, own), (x, own.roll(1)))
    )
    found = [
        m.blocks.compressor.comparison.importance for m in (one, two, other)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize(
    ('options', 'compression', 'message'),
    [
        (dict(patch_drop_rate=0.5), {}, 'patch_drop_rate'),
        ({}, dict(keeep=0.5), "keeep=0.5; did you mean 'keep'"),
    ],
)
def test_timm_models_that_do_not_fit(options, compression, message) -> None:
    model = timm_model(**options)
    with pytest.raises(ValueError, match=message):
        pm_seg.compress_model(
            model, [images()], **{'keep': 0.8, **compression}
        )
