"""Reading, writing and converting weights, without ever running code that a file brings along.

`reading`, `writing`, `formats` and `class_rows` are plain PyTorch; `checkpointer` and `convert`
need detectron2.
"""
