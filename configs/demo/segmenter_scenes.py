# A small Segmenter on drawn scenes, dense, from scratch.
_base_ = [
    '../_base_/models/segmenter_demo.py',
    '../_base_/datasets/scenes.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/demo.py',
]
