"""The packages; everything else about the project stands in pyproject.toml.

`tools`, `tests` and `projects` are left out on purpose: detectron2 already installs a package that
is called `tools`.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["dn_detr", "dn_detr.*"]))
