"""Time and memory of operations, and of denoising, beside other ways to do the same.

The scripts that measure are tools/benchmark_ops.py (multi-scale deformable attention) and
tools/benchmark_denoising.py. Plain PyTorch; detectron2 is not needed.
"""
