"""COCO-format sets: checks, registration, mapper and augmentation; the built-in shapes set.

``categories``, ``check`` and ``shapes`` are plain Python and numpy; ``augmentation``, ``datasets``
and ``mapper`` need detectron2.
"""
