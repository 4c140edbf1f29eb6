"""Reading, writing and converting weights, without ever running code that a file brings along.

`checkpointer`, `convert` and `fitting` need detectron2; all else is plain PyTorch.
"""
