"""COCO-format sets: checks, registration, mapper and augmentation; the built-in shapes set.

``augmentation``, ``datasets``, ``loader`` and ``mapper`` need detectron2; the others are plain
Python, numpy and Pillow (``plots``: and matplotlib), so that a set can be checked without.
"""
