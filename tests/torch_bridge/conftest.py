"""These tests need torch. Where it is missing they are not collected, since a run that may skip nothing has none."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
