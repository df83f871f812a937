"""Properties of static groups: any structure, grid, dtype and kind of map.

The tests beside this one check parts on their own; here everything is drawn at
random, and forms that must agree are compared.
"""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import EncoderShape, LayerCost, StaticCompressor

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 10**6)
prunings = st.sampled_from([0.0, 0.3])
TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-9),
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.bfloat16: dict(rtol=0.05, atol=0.1),
}
dtypes = st.sampled_from(list(TOLERANCE))
#: Weights start from float32, whatever the dtype.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def make(grid, prefix=1, depth=1, **options) -> StaticCompressor:
    cost = LayerCost(36.0, 72.0, 6.0)
    shape = EncoderShape(depth, grid, prefix, 3, 3, cost)
    return StaticCompressor(shape, **options)


def random_groups(grid, pruned: float, seed: int) -> torch.Tensor:
    """Any assignment at all: groups need not be connected, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1]
    count = int(torch.randint(1, total + 1, (1,), generator=generator))
    group = torch.randint(count, (total,), generator=generator)
    group[torch.rand(total, generator=generator) < pruned] = -1
    group[0] = 0
    used = group.unique()
    return torch.searchsorted(used[used >= 0], group).where(group >= 0, -1)


def given_structure(grid, prefix, pruned, seed, shake=0.0, **options):
    """One layer with arbitrary groups, and weights near the initial ones."""
    group = random_groups(grid, pruned, seed)
    count = [int(group.max()) + 1]
    module = make(grid, prefix, num_groups=count, **options).double()
    torch.manual_seed(seed)
    module.store(torch.rand(1, grid[0] * grid[1]) + 0.01)
    module.set_groups(group[None])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += shake * torch.rand_like(parameter)
    return module


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


# ----------------------------------------------------------------------- maps


@given(grids, st.integers(0, 4), st.integers(1, 3), prunings, dtypes, seeds)
@settings(max_examples=100)
def test_sparse_and_dense_form_agree_with_gradients(
    grid, prefix, batch, pruned, dtype, seed
) -> None:
    module = given_structure(grid, prefix, pruned, seed, 0.3)
    token_map = module.to(dtype).token_maps(grid)[0]
    if token_map is None:  # as many groups as tokens: the layer runs dense
        assert module.loads()[0].kept == grid[0] * grid[1]
        return
    x = torch.randn(batch, prefix + grid[0] * grid[1], 3).to(dtype)
    results = []
    for form in ('sparse', 'dense'):
        weights = [
            w.detach().clone().requires_grad_()
            for w in (token_map.merge_weight, token_map.restore_weight)
        ]
        used = replace(
            token_map, merge_weight=weights[0], restore_weight=weights[1]
        )
        used = used.to_dense() if form == 'dense' else used
        tokens = x.clone().requires_grad_()
        z = used.merge(tokens)
        out = used.restore(tokens, z.sin())
        out.cos().sum().backward()
        for weight in weights:  # those of pruned tokens mean nothing
            weight.grad *= token_map.live
        assert out.dtype == z.dtype == dtype
        results.append([z, out, tokens.grad, *(w.grad for w in weights)])
    for sparse, dense in zip(*results):
        scale = dense.abs().max().clamp_min(1).item()
        torch.testing.assert_close(
            sparse / scale, dense / scale, **TOLERANCE[dtype]
        )


@given(grids, st.integers(0, 3), prunings, seeds)
@settings(max_examples=60)
def test_restore_is_the_pseudo_inverse(grid, prefix, pruned, seed) -> None:
    """R = pinv(M), hence R M is a projection that never adds energy."""
    module = given_structure(grid, prefix, pruned, seed)
    token_map = module.token_maps(grid)[0]
    if token_map is None:
        return
    dense = token_map.to_dense()
    inverse = torch.linalg.pinv(dense.merge_matrix)
    torch.testing.assert_close(dense.restore_matrix, inverse, **CLOSE)
    x = torch.randn(2, prefix + grid[0] * grid[1], 3).double()
    once = dense.restore_matrix @ (dense.merge_matrix @ x)
    twice = dense.restore_matrix @ (dense.merge_matrix @ once)
    torch.testing.assert_close(once, twice, **CLOSE)
    assert once.norm() <= x.norm() * (1 + 1e-5)


@given(grids, st.integers(0, 3), prunings, seeds)
@settings(max_examples=60)
def test_round_trip(grid, prefix, pruned, seed) -> None:
    """A layer that does nothing changes nothing a restore can represent."""
    module = given_structure(grid, prefix, pruned, seed)
    x = torch.randn(2, prefix + grid[0] * grid[1], 3).double()
    once = module.run([unchanged], x, grid).last
    twice = module.run([unchanged], once, grid).last
    torch.testing.assert_close(twice, once, **CLOSE)
    pruned = module.group[0] < 0
    assert torch.equal(once[:, prefix:][:, pruned], x[:, prefix:][:, pruned])
    assert torch.equal(once[:, :prefix], x[:, :prefix])


@given(
    grids, grids, st.integers(0, 2), st.sampled_from(['sparse', 'dense']),
    seeds,
)  # fmt: skip
@settings(max_examples=40)
def test_any_structure_fits_any_grid(
    native, grid, prefix, matrices, seed
) -> None:
    """As many groups; gradients arrive at what was learned."""
    module = given_structure(native, prefix, 0.2, seed, 0.3, matrices=matrices)
    token_map = module.token_maps(grid)[0]
    if token_map is None:
        assert matrices == 'sparse'
        return
    x = torch.randn(2, prefix + grid[0] * grid[1], 3).double()
    z = token_map.merge(x)
    assert z.shape == (2, prefix + module.num_groups[0], 3)
    token_map.restore(x, z.sin() + 1).square().sum().backward()
    for parameter in module.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize('grid', [(3, 4), (4, 3)])
def test_gradients_of_tokens_and_parameters(grid) -> None:
    """Also of the native weights, through another grid's."""
    module = given_structure((3, 4), 2, 0.2, 0, 0.3)
    names, weights = zip(*module.named_parameters())

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        inputs = ([torch.sin], x, grid)
        values = dict(zip(names, weights))
        return torch.func.functional_call(
            Runner(module), {f'module.{k}': v for k, v in values.items()},
            inputs,
        )  # fmt: skip

    x = torch.randn(1, 14, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *weights))


class Runner(torch.nn.Module):
    """Calls ``run`` as a module is called."""

    def __init__(self, module: StaticCompressor) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args) -> torch.Tensor:
        return self.module.run(*args).last


# ------------------------------------------------------ structures from scores


@given(
    grids,
    st.sampled_from(['global', 'layer']),
    st.sampled_from([0.3, 0.6, 1.0]),
    prunings,
    st.sampled_from(['even', 'equal', 'steep', 'sparse']),
    seeds,
)
@settings(max_examples=100)
def test_any_scores_give_partitions(
    grid, threshold, keep_rate, prune_rate, kind, seed
) -> None:
    """Also with scores that tie, that span 30 decades, or are mostly 0."""
    torch.manual_seed(seed)
    keep_rate = min(keep_rate, 1 - prune_rate)
    module = make(
        grid, depth=2, keep_rate=keep_rate, prune_rate=prune_rate,
        threshold=threshold,
    ).double()  # fmt: skip
    scores = torch.rand(module.scores.shape).double()
    if kind == 'equal':
        scores = torch.ones_like(scores)
    elif kind == 'steep':
        scores = 10 ** (30 * scores - 15)
    elif kind == 'sparse':
        scores = scores * (scores > 0.8)
        scores[:, 0] = 0.5
    try:
        module.set_scores(scores)
    except ValueError as error:
        assert threshold == 'global' and 'would keep none' in str(error)
        return
    total = grid[0] * grid[1]
    x = torch.randn(2, total + 1, 4).double()
    for load, token_map in zip(module.loads(), module.token_maps(grid)):
        if token_map is None:
            assert load.kept == total
            continue
        assert token_map.num_merged == load.kept + 1
        group = token_map.groups(1)
        used = group.unique()
        assert torch.equal(used[used >= 0], torch.arange(load.kept))
        assert int((group < 0).sum()) == load.pruned
        z = token_map.merge(x)
        for number in range(load.kept):
            member = group == number
            weight = token_map.merge_weight[1:][member]
            expected = (x[:, 1:][:, member] * weight[:, None]).sum(1)
            torch.testing.assert_close(z[:, number + 1], expected, **CLOSE)
    out = module.run([unchanged] * 2, x, grid).last
    assert torch.isfinite(out).all() and torch.equal(out[:, 0], x[:, 0])


@given(
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.integers(0, 2),
    st.sampled_from(['global', 'layer']),
    prunings,
    st.floats(0.01, 1),
    seeds,
)
@settings(max_examples=60)
def test_a_budget_is_met_or_refused(
    grid, prefix, threshold, prune_rate, keep, seed
) -> None:
    torch.manual_seed(seed)
    rules = dict(threshold=threshold, prune_rate=prune_rate)
    module = make(grid, prefix, 3, **rules)
    module.store(torch.rand(3, grid[0] * grid[1]) + 0.5)
    try:
        module.set_keep(keep)
    except ValueError as error:
        assert 'out of reach' in str(error) or 'keep none' in str(error)
        return
    assert module.share <= keep + 1e-6
    before = [load.kept for load in module.loads()]
    more = module.keep_rate + 1.01 / (grid[0] * grid[1])
    if more + prune_rate <= 1:
        module.keep, module.keep_rate = None, more
        module.build()
        assert module.share > keep - 1e-6
        assert sum(before) < sum(load.kept for load in module.loads())


# -------------------------------------------------------------- state dicts


@given(
    grids.filter(lambda grid: grid[0] * grid[1] >= 4),
    grids,
    st.sampled_from([0.4, 0.7]),
    st.sampled_from([0.0, 0.2]),
    dtypes,
    seeds,
)
@settings(max_examples=40)
def test_state_dict_is_all_there_is(
    native, grid, keep_rate, prune_rate, dtype, seed
) -> None:
    """A saved compressor works alike on every grid, whatever its options."""
    torch.manual_seed(seed)
    module, other = (
        make(
            native, depth=3, keep_rate=keep_rate, prune_rate=prune_rate
        ).to(dtype)
        for _ in range(2)
    )  # fmt: skip
    module.set_scores(torch.rand(3, native[0] * native[1]) + 0.01)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.loads() == module.loads()
    for size in (native, grid):
        x = torch.randn(2, 1 + size[0] * size[1], 4).to(dtype)
        layers = [torch.sin] * 3
        expected = module.run(layers, x, size).last
        assert torch.equal(other.run(layers, x, size).last, expected)
