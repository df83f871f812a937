"""Merge and restore of given groups, for any groups."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pm_seg.core import Merge
from pm_seg.core.merging import Chain
from pm_seg.core.rows import spread_rows, sum_rows
from pm_seg.core.similarity import all_rows, merge_into


class Case(NamedTuple):
    """Tokens, and who of them goes where."""

    x: Tensor  # (B, P+T, C)
    size: Tensor  # (B, P+T, 1)
    target: Tensor  # (B, T)
    merge: Merge
    prefix: int
    merged: int  # P+K


def go_to(target: Tensor, prefix: int = 0) -> Merge:
    """Each patch token goes to the given one, or stays, (B, T)."""
    stays = target == torch.arange(target.shape[1])
    moved = torch.stack([(~row).nonzero().flatten() for row in stays])
    goal = target.gather(1, moved)
    rows = all_rows(target.unsqueeze(2), prefix)
    moved, goal = (rows[:, prefix:].gather(1, t) for t in (moved, goal))
    return merge_into(rows, moved, goal)


def make_case(
    batch: int, tokens: int, share: float, prefix: int, seed: int
) -> Case:
    """Random tokens that go to random ones which stay."""
    generator = torch.Generator().manual_seed(seed)
    count = int(share * (tokens - 1))
    rows = []
    for _ in range(batch):
        order = torch.randperm(tokens, generator=generator)
        row, stay = torch.arange(tokens), order[count:]
        chosen = torch.randint(len(stay), (count,), generator=generator)
        row[order[:count]] = stay[chosen]
        rows.append(row)
    shape = (batch, prefix + tokens)
    target = torch.stack(rows)
    return Case(
        torch.randn(*shape, 3, generator=generator).double(),
        torch.randint(1, 9, (*shape, 1), generator=generator).double(),
        target,
        go_to(target, prefix),
        prefix,
        prefix + tokens - count,
    )


cases = st.builds(
    make_case,
    st.integers(1, 3),
    st.integers(1, 20),
    st.floats(0, 1),
    st.integers(0, 3),
    st.integers(0, 10**6),
)


def membership(case: Case) -> Tensor:
    """Which token is in which group, 0 or 1, (B, P+K, P+T)."""
    groups = torch.arange(case.merged)[:, None]
    return (case.merge.place[:, None] == groups).double()


@given(cases)
def test_a_merge_is_a_partition_that_keeps_the_order(case: Case) -> None:
    merge, (batch, tokens) = case.merge, case.x.shape[:2]
    prefix = torch.arange(case.prefix)
    rows = torch.arange(batch)[:, None]
    kept = merge.kept.view(batch, -1) - rows * tokens
    assert kept.shape[1] == case.merged
    assert (kept.diff(dim=1) > 0).all(), 'order'
    assert torch.equal(kept[:, : case.prefix], prefix.expand(batch, -1))
    # Every group starts as the token that stays, ...
    start = merge.place.gather(1, kept)
    assert torch.equal(start, torch.arange(case.merged).expand(batch, -1))
    # ... which is where its members wanted to go; prefix tokens are alone.
    members = membership(case)
    assert (members[:, : case.prefix].sum(2) == 1).all()
    goal = kept.gather(1, merge.place)[:, case.prefix :] - case.prefix
    assert torch.equal(goal, case.target)
    # Each token is kept or moved, once, and moves to its place.
    both = torch.cat([merge.kept, merge.moved]).sort().values
    assert torch.equal(both, torch.arange(batch * tokens))
    moved = merge.moved.view(batch, -1) - rows * tokens
    into = merge.into.view(batch, -1) - rows * case.merged
    assert torch.equal(merge.place.gather(1, moved), into)


@given(cases)
def test_groups_are_means_weighted_by_size(case: Case) -> None:
    merged, size = case.merge.merge(case.x, case.size)
    members = membership(case)
    torch.testing.assert_close(size, members @ case.size)
    expected = members @ (case.size * case.x) / (members @ case.size)
    torch.testing.assert_close(merged, expected)


@given(cases)
def test_what_no_layer_changed_is_restored_exactly(case: Case) -> None:
    merged, _ = case.merge.merge(case.x, case.size)
    gain = torch.randn(len(case.x), case.merged, 1)
    restored = case.merge.restore(case.x, merged, merged, gain)
    assert torch.equal(restored, case.x)


@given(cases)
def test_every_token_gets_what_its_group_gained(case: Case) -> None:
    merged, _ = case.merge.merge(case.x, case.size)
    gained, gain = torch.randn_like(merged), torch.randn_like(merged[..., :1])
    restored = case.merge.restore(case.x, merged, merged + gained, gain)
    expected = case.x + membership(case).mT @ (gain * gained)
    torch.testing.assert_close(restored, expected)


@given(cases)
def test_spreading_is_the_transpose_of_adding_up(case: Case) -> None:
    z = torch.randn(len(case.x), case.merged, 3).double()
    place = case.merge.place
    total = sum_rows(case.x, place, case.merged)
    torch.testing.assert_close(total, membership(case) @ case.x)
    spread = spread_rows(z, place)
    assert torch.equal(spread, case.merge.spread(z))
    torch.testing.assert_close((spread * case.x).sum(), (z * total).sum())


@given(cases, st.randoms(use_true_random=False))
def test_each_image_of_a_batch_is_on_its_own(case: Case, random) -> None:
    """Bit for bit, in any order."""
    order = list(range(len(case.x)))
    random.shuffle(order)
    together = go_to(case.target[order], case.prefix)
    x, size = case.x[order], case.size[order]
    merged, total = together.merge(x, size)
    out = together.restore(x, merged, merged.sin(), total.sin())
    for row, image in enumerate(order):
        one = go_to(case.target[[image]], case.prefix)
        z, s = one.merge(case.x[[image]], case.size[[image]])
        assert torch.equal(merged[[row]], z)
        assert torch.equal(total[[row]], s)
        restored = one.restore(case.x[[image]], z, z.sin(), s.sin())
        assert torch.equal(out[[row]], restored)


@given(cases)
@settings(max_examples=10)
def test_gradients_of_merge_and_restore(case: Case) -> None:
    def run(x: Tensor, gain: Tensor) -> Tensor:
        merged, size = case.merge.merge(x, case.size)
        after = merged.sin() + size
        return case.merge.restore(x, merged, after, gain)

    x = case.x.clone().requires_grad_()
    gain = torch.rand(len(x), case.merged, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, gain))


@given(cases)
@settings(max_examples=10)
def test_compiled_sums_are_those_of_the_eager_form(case: Case) -> None:
    """There a product with a 0-1 matrix takes the place of a sum."""
    expected = case.merge.merge(case.x, case.size)
    summed = sum_rows(case.x, case.merge.place, case.merged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, 'is_compiling', lambda: True)
        sorted_merge = go_to(case.target, case.prefix)
        found = case.merge.merge(case.x, case.size)
        again = sum_rows(case.x, case.merge.place, case.merged)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, summed)
    for field in ('kept', 'moved', 'into', 'rows'):
        expected = getattr(case.merge, field)
        assert torch.equal(getattr(sorted_merge, field), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sizes_stay_exact_in_half_precision(dtype: torch.dtype) -> None:
    """Of 300 tokens: half precision cannot count so far in steps of one."""
    target = torch.zeros(1, 600, dtype=torch.int64)
    target[0, 300:] = torch.arange(300, 600)
    chain = Chain(torch.randn(1, 600, 4).to(dtype), num_prefix=0)
    chain.merge(go_to(target), torch.tensor(1.0))
    assert chain.size.dtype == torch.float32 and chain.size[0, 0] == 300
    assert chain.x.dtype == dtype


@pytest.mark.parametrize('kind', ['residual', 'replace'])
def test_a_chain_undoes_its_merges_newest_first(kind: str) -> None:
    """Two merges, and a layer that adds a number after each of them."""
    x = torch.randn(1, 5, 2).double()
    chain = Chain(x, num_prefix=1)
    assert chain.log_size is None and chain.groups() is None
    assert torch.equal(chain.restored(kind), x)
    gain = torch.tensor(0.5)
    chain.merge(go_to(torch.tensor([[0, 0, 2, 3]]), 1), gain)
    chain.x = chain.x + 1
    chain.merge(go_to(torch.tensor([[0, 0, 2]]), 1), gain)
    chain.x = chain.x + 10
    assert chain.tokens == 2 and chain.num_prefix == 1
    assert chain.size.flatten().tolist() == [1, 3, 1]
    torch.testing.assert_close(chain.log_size.exp()[0, 1].item(), 3.0)
    groups = chain.groups()
    assert groups.place.tolist() == [[0, 0, 0, 1]]
    patches = x[:, 1:]
    mean = torch.stack([patches[:, :3].mean(1), patches[:, 3]], 1)
    torch.testing.assert_close(groups.mean(patches), mean)
    assert torch.equal(groups.spread(mean)[0, :, 0], mean[0, [0, 0, 0, 1], 0])
    out = chain.restored(kind)
    torch.testing.assert_close(out[:, 0], x[:, 0] + 11, msg='prefix')
    torch.testing.assert_close(out[:, 4], x[:, 4] + 11, msg='never merged')
    if kind == 'replace':
        expected = (patches[:, :3].mean(1) + 11)[:, None].expand(-1, 3, -1)
    else:
        # The first two were merged for both sums, the third for the second
        # alone; what it got on its own before that is all its own.
        first = x[:, 1:3] + 0.5 * (1 + 0.5 * 10)
        third = x[:, 3:4] + 1 + 0.5 * 10
        expected = torch.cat([first, third], 1)
    torch.testing.assert_close(out[:, 1:4], expected)
