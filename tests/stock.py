"""What each of our modules promises: its stock class, with nothing asked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def tensors(outs: object) -> list[Tensor]:
    """All tensors of nested outputs, in order."""
    if isinstance(outs, Tensor):
        return [outs]
    return [tensor for out in outs for tensor in tensors(out)]


def randomise(model: nn.Module) -> None:
    """Let no parameter hide behind its initial zeros or ones."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)


def assert_like_stock(
    stock: Callable[..., nn.Module],
    ours: Callable[..., nn.Module],
    options: dict,
    inputs: object,
) -> None:
    """Same keys, initial weights for a seed, frozen parts and results."""
    models = []
    for build in (stock, ours):
        torch.manual_seed(0)
        model = build(**copy.deepcopy(options))
        model.init_weights()
        models.append(model)
    stock, ours = models
    stock_state, ours_state = stock.state_dict(), ours.state_dict()
    assert list(ours_state) == list(stock_state)
    for key, value in stock_state.items():
        assert torch.equal(ours_state[key], value), key
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    for name, module in stock.named_modules():
        assert ours.get_submodule(name).training == module.training, name
    randomise(stock)
    ours.load_state_dict(stock.state_dict())
    stock.eval()  # returns nothing there
    with torch.no_grad():
        expected, actual = stock(inputs), ours.eval()(inputs)
    assert isinstance(actual, type(expected))
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
