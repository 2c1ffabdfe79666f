"""Stands for Ray's script of this name: see setup_worker.py, which it runs."""

import os
import runpy

runpy.run_path(
    os.path.join(os.path.dirname(__file__), "setup_worker.py"),
    {"SCRIPT": os.path.basename(__file__)},
    run_name="__main__",
)
