"""Data: registration and checks of COCO-format sets, the mapper, augmentation, the built-in shapes set.

``categories``, ``check`` and ``shapes`` are plain Python and numpy; ``augmentation``, ``datasets`` and
``mapper`` need detectron2.
"""
