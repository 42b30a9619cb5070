"""Which sharp edges of the systems before us have a regression test here, and why the others have none yet.

An edge S-07 has tests that are named `test_s07_...`. SGLang's `mem_cache` has S-01 to S-43, S-53 and S-56 to S-58;
pymllm's caches and runner have S-44 to S-52, S-54 and S-55.
"""

from __future__ import annotations

import re
from pathlib import Path

LAST = 58
HOST_TIER = {
    22: "the tail of an unfinished prefetch is released twice, and host slots with it",
    31: "host pools answer True to every question about their state unless they are being debugged",
    32: "pages of a host pool are assumed to be contiguous, and its sizes are hard-coded",
    33: "an unknown backend for loads into an MLA pool is a silent no-op",
    37: "a reset leaves host slots in a queue that frees them again",
    38: "a reset leaves entries of operations in flight, whose node ids are given out anew",
    39: "a node that is split while it is written to the host reaches the storage in part",
    41: "to evict while the host is full ends in an assertion",
    42: "nodes that only the host has are orphaned when their parent goes",
    56: "prefetched pages of a node that is on the device are thrown away",
    57: "a prefetch ends at the first look, so that a lightly loaded server finds nothing",
    58: "every poll is a blocking reduction over all ranks, with nothing to reduce",
}
STORAGE_TIER = {
    35: "a storage key knows no namespace, weights, dtype, page size or layout",
    36: "a torn file is read, kept and counted as written",
}


def test_every_sharp_edge_has_a_test_or_waits_for_its_tier():
    names = [
        name
        for file in Path(__file__).resolve().parent.parent.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_s\d\d_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(names) == len(set(names)), "two tests of one name hide one of them"
    tested = {int(name[6:8]) for name in names}
    waiting = HOST_TIER.keys() | STORAGE_TIER.keys()
    assert tested | waiting == set(range(1, LAST + 1))
    assert not tested & waiting, "it has a test by now: take it off the list"
