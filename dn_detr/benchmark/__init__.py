"""Time and memory of multi-scale deformable attention, beside other implementations of it.

The script that measures is tools/benchmark_ops.py. Plain PyTorch; detectron2 is not needed.
"""
