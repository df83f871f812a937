"""Deliberate faults in the core, for mutation_check.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of the source.

    Attributes:
        module (str): File of pm_seg/core, or with a slash of pm_seg, without
            suffix.
        what (str): The fault in words.
        old, new (str): Text that occurs once, and what it becomes.
        tests (tuple[str, ...]): Files of tests/core, or with a slash of
            tests, that may notice it.
    """

    module: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


MERGE = ('test_merging',)
FOUND = ('test_similarity',)
RUN = ('test_progressive', 'test_contract')
MAPS = ('test_token_map', 'test_properties')
STATIC = ('test_static', 'test_static_groups', 'test_properties')

# fmt: off
FAULTS = (
    Fault(
        'merging', 'means ignore sizes',
        'update * share.to(x.dtype)', 'update * 0.5', MERGE,
    ),
    Fault(
        'merging', 'a group starts from nothing',
        'update = update - start.index_select(0, self.into)',
        'update = update + 0 * start.index_select(0, self.into)', MERGE,
    ),
    Fault(
        'merging', 'sizes do not grow',
        'total = add_rows(start.clone(), self.into, moved, batch)',
        'total = start + 0', MERGE,
    ),
    Fault(
        'merging', 'restore gives the output, not the update',
        'gained = (after - merged) * gain', 'gained = after * gain', MERGE,
    ),
    Fault(
        'merging', 'restore forgets the token itself',
        'return before + self.spread(gained)',
        'return self.spread(gained)', MERGE,
    ),
    Fault(
        'merging', 'the gain scales tokens that stayed alone',
        'torch.where(self.size != start, gain, 1.0)',
        'torch.where(self.size > 0, gain, 1.0)', MERGE,
    ),
    Fault(
        'merging', 'merges are undone oldest first',
        'in reversed(self.steps):', 'in self.steps:', MERGE,
    ),
    Fault(
        'merging', "ToMe's restore adds residuals too",
        "if kind == 'residual':", 'if kind:', MERGE,
    ),
    Fault(
        'merging', 'groups of a chain end with the first merge',
        'for following in others:', 'for following in others[:0]:', MERGE,
    ),
    Fault(
        'merging', 'means of groups are sums',
        '/ size.to(x.dtype)', '/ 1', MERGE,
    ),
    Fault(
        'merging', "rotary tables of all layers are the first's",
        'rows[:, layer * heads : (layer + 1) * heads]',
        'rows[:, :heads]', ('test_extra',),
    ),
    Fault(
        'merging', 'rotary tables of groups are not weighted',
        'self._rows = merge.mean(self._rows, share)',
        'self._rows = merge.mean(self._rows, share * 0)', ('test_extra',),
    ),
    Fault(
        'rows', 'images of a batch share rows',
        'index = index + start.unsqueeze(1)',
        'index = index + 0 * start.unsqueeze(1)', MERGE,
    ),
    Fault(
        'rows', 'the product of compiled graphs misses tokens',
        'member = rows.view(batch, -1, 1) == into.view(batch, 1, -1)',
        'member = rows.view(batch, -1, 1) == into.view(batch, 1, -1) + 1',
        (*MERGE, 'test_contract'),
    ),
    Fault(
        'similarity', 'sketches have no signs',
        'folded = (x * signs.to(x.dtype))', 'folded = x', FOUND,
    ),
    Fault(
        'similarity', 'the least similar pairs merge',
        'source = nearness.argsort(dim=-1)',
        'source = nearness.argsort(dim=-1, descending=True)', FOUND,
    ),
    Fault(
        'similarity', 'tokens of unequal length look unequal',
        'unit = F.normalize(metric, dim=-1)\n    even',
        'unit = metric\n    even', FOUND,
    ),
    Fault(
        'similarity', 'importance of the partner is ignored',
        'odd = odd * odd_weight.unsqueeze(-1)', 'odd = odd * 1', FOUND,
    ),
    Fault(
        'similarity', 'importance of the token itself is ignored',
        'nearness = -difference * even_weight', 'nearness = -difference',
        FOUND,
    ),
    Fault(
        'similarity', 'prefix tokens take part',
        'patches = rows[:, num_prefix:]', 'patches = rows', FOUND,
    ),
    Fault(
        'similarity', 'windows overlap',
        'index = index[: height // 2 * 2, : width // 2 * 2]',
        'index = index[: height // 2 * 2, : width // 2 * 2].roll(1, 1)',
        FOUND,
    ),
    Fault(
        'similarity', 'the least uniform windows merge',
        '.topk(count, dim=1)', '.topk(count, dim=1, largest=False)', FOUND,
    ),
    Fault(
        'schedule', 'finding groups costs nothing',
        'macs += before * found + pairs * compared', 'macs += 0',
        ('test_schedule',),
    ),
    Fault(
        'schedule', 'merge and restore cost nothing',
        'macs += rows * (dims + shape.extra_dims)', 'macs += 0',
        ('test_schedule',),
    ),
    Fault(
        'schedule', 'the power is ignored',
        '** power, FLOOR)', '** 1.0, FLOOR)', ('test_schedule',),
    ),
    Fault(
        'schedule', 'the first layer merges whatever it is told',
        'steps = [max(layer - first + 1, 0)', 'steps = [max(layer + 1, 0)',
        ('test_schedule',),
    ),
    Fault(
        'schedule', 'small merges do not wait',
        'share < left and left - share >= step * left', 'share < left',
        ('test_schedule',),
    ),
    Fault(
        'schedule', 'a budget that few merges cannot meet is refused',
        'except ValueError:  # all that is to go goes in few layers',
        'except ZeroDivisionError:', ('test_schedule',),
    ),
    Fault(
        'schedule', 'layers that wait merge all the same',
        'left = share if layer in layers else left', 'left = share',
        ('test_schedule',),
    ),
    Fault(
        'schedule', 'counts are no multiples of 8',
        'count = 8 * round(count / 8) if count > 64 else round(count)',
        'count = round(count)', ('test_schedule',),
    ),
    Fault(
        'schedule', 'a step merges more than half',
        'return min(before - after, before // 2)', 'return before - after',
        ('test_schedule', *RUN),
    ),
    Fault(
        'schedule', 'the budget is overdrawn',
        'return cost(shares(step / 2**40)) <= budget',
        'return cost(shares(step / 2**40)) <= 1.05 * budget',
        ('test_schedule',),
    ),
    Fault(
        'merging', 'attention does not know sizes',
        'return self.x, self.log_size, *extra_of(self.extra, layer)',
        'return self.x, None, *extra_of(self.extra, layer)', RUN,
    ),
    Fault(
        'progressive', 'outputs on the way stay merged',
        'if index in outputs or index == len(layers) - 1:',
        'if index == len(layers) - 1 or (last := chain.x) is None:', RUN,
    ),
    Fault(
        'progressive', 'keys are compared after attention',
        'compared, chain.size,', 'chain.x, chain.size,', RUN,
    ),
    Fault(
        'comparison', 'sizes do not count in matching',
        'if self.balance:', 'if False:', RUN,
    ),
    Fault(
        'comparison', 'importance never counts',
        'if self._strength:', 'if False:', RUN,
    ),
    Fault(
        'progressive', 'a checkpoint brings no shares',
        'self._shares = [x / WHOLE for x in self.shares.tolist()]',
        'pass', RUN,
    ),
    Fault(
        'progressive', 'the power of a checkpoint is lost',
        'changes = dict(power=float(self.power), compare=compare)',
        'changes = dict(compare=compare)', RUN,
    ),
    Fault(
        'progressive', 'the components of a checkpoint are not compared',
        'if self.by_components:', 'if False:', RUN,
    ),
    Fault(
        'progressive', 'components cost nothing',
        'return better, better.solve(keep)',
        'return better, schedule.solve(keep)', RUN,
    ),
    Fault(
        'importance', 'the logarithm is left out',
        '.clamp_min(torch.finfo(torch.float64).tiny).log()',
        '.clamp_min(torch.finfo(torch.float64).tiny)', ('test_importance',),
    ),
    Fault(
        'importance', 'images are not centred',
        'wanted = wanted - wanted.mean(1, keepdim=True)',
        'wanted = wanted - 0', ('test_importance',),
    ),
    Fault(
        'importance', 'components of what all tokens of an image have',
        'known = known - known.mean(1, keepdim=True)', 'known = known - 0',
        ('test_importance',),
    ),
    Fault(
        'importance', 'the components in which tokens differ least',
        'vectors[..., -COMPONENTS:]', 'vectors[..., :COMPONENTS]',
        ('test_importance',),
    ),
    Fault(
        'importance', 'no ridge',
        'gram = self.gram + self.ridge *', 'gram = self.gram + 0 *',
        ('test_importance',),
    ),
    Fault(
        'scores', 'scores of heads cancel',
        'score, weight = score.abs().sum(0) * batch, batch',
        'score, weight = score.sum(0).abs() * batch, batch',
        ('test_scores',),
    ),
    Fault(
        'scores', 'the mean over the batch is forgotten',
        'score, weight = score.abs().sum(0) * batch, batch',
        'score, weight = score.abs().sum(0), batch', ('test_scores',),
    ),
    Fault(
        'scores', 'prefix tokens are scored',
        'value_gradient_scores(value, grad)[:, self.num_prefix :]',
        'value_gradient_scores(value, grad)[:, : self.num_tokens]',
        ('test_scores',),
    ),
    Fault(
        'structure', 'the decay of scores over depth is dropped',
        'return scores / norm * (1 - decay * index).unsqueeze(1)',
        'return scores / norm', ('test_structure',),
    ),
    Fault(
        'structure', 'the threshold of centres is off by one',
        'pool[:, -max(keep * rows, 1)]', 'pool[:, -max(keep * rows, 1) - 1]',
        ('test_structure',),
    ),
    Fault(
        'structure', 'row windows test the row of the centre itself',
        'row = (first + 1) // width', 'row = first // width',
        ('test_structure',),
    ),
    Fault(
        'structure', 'restore weights are no pseudo-inverse',
        'index_add(0, index, merge.square())', 'index_add(0, index, merge)',
        ('test_structure', 'test_token_map'),
    ),
    Fault(
        'token_map', 'pruned tokens are not put back',
        'return torch.where(self.live.unsqueeze(1), rows, x)',
        'return rows', MAPS,
    ),
    Fault(
        'token_map', 'merge weights are ignored',
        'rows = x * self.merge_weight.to(x.dtype).unsqueeze(1)',
        'rows = x * 1', MAPS,
    ),
    Fault(
        'token_map', 'matrices on another grid are not averaged',
        'resize(merge * area)', 'resize(merge)',
        MAPS,
    ),
    Fault(
        'token_map', 'the shortcut of matrices reaches all tokens',
        'bypass = (~self.live)', 'bypass = (self.live | True)', MAPS,
    ),
    Fault(
        'static', 'merging costs nothing',
        'passes = 2\n', 'passes = 0\n', STATIC,
    ),
    Fault(
        'token_map', 'weights of pruned tokens are trained',
        'F.pad(merge, (num_prefix, 0), value=1.0) * live',
        'F.pad(merge, (num_prefix, 0), value=1.0)', STATIC,
    ),
    Fault(
        'static', 'scores are cast with the model',
        'self.scores = scores.to(self.scores.device)', 'pass', STATIC,
    ),
    Fault(
        'static', 'damaged groups are loaded',
        'count_groups(self.group, layers, self.num_groups)',
        '(self.group.amax(1) + 1).tolist()', STATIC,
    ),
)
# fmt: on
