"""The top folders of this repository are installed as sub-packages of `elastic_moe`, so that no name collides.

Everything else about the distribution is in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = ["cluster", "optimizer", "model", "actors", "deploy"]
found = find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])

setup(
    packages=[f"elastic_moe.{package}" for package in found],
    package_dir={f"elastic_moe.{folder}": folder for folder in FOLDERS},
)
