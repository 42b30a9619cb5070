"""Notebooks are executed as tests. One needs torch: where that is missing it is not collected."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["06_one_memory_two_frameworks.ipynb"]
