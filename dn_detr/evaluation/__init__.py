"""COCO evaluation, and pictures and curves of results."""
