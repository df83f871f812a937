"""Faults that only a GPU, or several processes, would show to a user.

Each was in a version of this package. The tests named with it run without a
GPU, see tests/devices.py.
"""

from __future__ import annotations

from faults import Fault

DEVICES = ('test_devices',)
RUNS = ('cli/test_runs',)
BENCHMARK = ('cli/test_benchmark',)
TARGETS = ('engine/test_targets',)

# fmt: off
DEVICE_FAULTS = (
    Fault(
        'engine/targets', 'each process measures a latency of its own',
        '        broadcast(value)\n', '', TARGETS,
    ),
    Fault(
        'engine/targets', 'latencies are of one image',
        'calls = native_calls(model, batch)',
        'calls = native_calls(model, 1)', TARGETS,
    ),
    Fault(
        'engine/targets', 'latencies are of eager mode',
        'torch.compile(run, dynamic=False) if compiled else run', 'run',
        TARGETS,
    ),
    Fault(
        'engine/targets', 'compiled code has no result and leaves all out',
        "return model(images, mode='tensor')",
        "model(images, mode='tensor')", TARGETS,
    ),
    Fault(
        'cli/runs', 'mixed precision is float16 everywhere',
        "wrapper.setdefault('dtype', 'bfloat16')", 'pass', RUNS,
    ),
    Fault(
        'cli/runs', 'float16 has no loss scaling',
        "'dynamic' if scaled else 1.0", '1.0', RUNS,
    ),
    Fault(
        'cli/runs', 'batches are not pinned',
        "cfg[name].setdefault('pin_memory', True)", 'pass', RUNS,
    ),
    Fault(
        'progressive', 'autocast rounds similarities',
        'with full_precision(x):', 'with torch.no_grad():',
        ('test_progressive',),
    ),
    Fault(
        'comparison', 'a forward pass waits for the device',
        'if self._strength:', 'if float(self.strength):', DEVICES,
    ),
    Fault(
        'comparison', 'a buffer stays on the CPU',
        'random_signs(shape.dims).to(self.strength.device)',
        'random_signs(shape.dims)', DEVICES,
    ),
    Fault(
        'schedule', 'products are of odd sizes',
        'count = 8 * round(count / 8) if count > 64 else round(count)',
        'count = 8 * round(count / 8) + 2 if count > 64 else round(count)',
        DEVICES,
    ),
    Fault(
        'rows', 'sums are products with large matrices',
        'if not torch.compiler.is_compiling():', 'if False:', DEVICES,
    ),
    Fault(
        'static', 'half precision rounds scores to zero',
        'elif self.scores.dtype != scores.dtype:', 'elif False:',
        ('test_static_groups',),
    ),
    Fault(
        'models/layers', 'attention on a GPU has a mask',
        "if q.device.type == 'cpu'", 'if q is not None',
        ('models/test_layers', 'models/test_device_models'),
    ),
    Fault(
        'engine/user_models', 'equal models differ under TF32',
        'evaluating(backbone), full_products():', 'evaluating(backbone):',
        ('./test_api',),
    ),
    Fault(
        'engine/hooks/guard_hook', 'all labels are looked at on a GPU',
        'step = 8 if cuda else 1', 'step = 1', ('engine/hooks/test_guards',),
    ),
    Fault(
        'cli/bench_measure', 'peak memory is that of all models',
        'torch.cuda.max_memory_allocated(device) - before',
        'torch.cuda.max_memory_allocated(device)', BENCHMARK,
    ),
    Fault(
        'cli/bench_measure', 'a second GPU is called CPU',
        "    if device.type == 'cuda':\n        return",
        "    if str(device) == 'cuda':\n        return", BENCHMARK,
    ),
    Fault(
        'cli/benchmark', 'fp32 runs without TF32',
        "torch.set_float32_matmul_precision('high')", 'pass', BENCHMARK,
    ),
    Fault(
        'cli/benchmark', 'onnx is refused on a machine with a GPU',
        "    if 'onnx' in args.modes:\n",
        "    if 'onnx' in args.modes:\n        if cuda:\n"
        "            wrong_usage('onnx')\n", BENCHMARK,
    ),
)
# fmt: on
