"""Does the driver see bugs? `python -m tests.model.mutants [--ops 20000] [--jobs 2] [NAME ...]`

Each mutant is one textual change to a copy of the package; the driver then runs over the copy and has to fail. The last
column says how many operations it took at most.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE, RECENCY, RADIX = "index/tree.py", "index/recency.py", "caches/radix.py"
BASE, OWNERS, EXPAND, RING = "pages/base.py", "pages/ownership.py", "pages/expand.py", "pages/ring.py"
TABLE, KEY, BATCH = "pools/requests.py", "index/key.py", "pages/batch.py"
MANAGER, STEP = "manager.py", "step.py"


@dataclass(frozen=True)
class Mutant:
    """`old`, which must occur exactly once in `file`, becomes `new`; `driver` gets its `share` of the operations."""

    name: str
    file: str
    old: str
    new: str
    driver: str = "tests.model.driver"
    share: int = 1

    def apply(self, package: Path) -> None:
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise SystemExit(f"{self.name}: {self.old!r} occurs {source.count(self.old)} times in {self.file}, not once")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


MUTANTS = [
    # The tree: walking, splitting, inserting.
    Mutant("match ignores the namespace", TREE, "self._roots.get(key.namespace)\n        if root is None:\n            return Match", "next(iter(self._roots.values()), None)\n        if root is None:\n            return Match"),
    Mutant("mismatch rounded up to a page", TREE, "offset + same // page_bytes * page_bytes", "offset + -(-same // page_bytes) * page_bytes"),
    Mutant("match longer than the key", TREE, "if packed.startswith(segment, offset, end):", "if packed.startswith(segment[:page_bytes], offset):"),
    Mutant("match does not use its path", TREE, "        for policy in self._policies:\n            policy.touch(whole)\n", ""),
    Mutant("match uses the node it ends inside", TREE, "policy.touch(whole)", "policy.touch(path)"),
    Mutant("match one page short inside a node", TREE, "tail = tail[: (length - last.parent.end) // self.page_size]", "tail = tail[1 : (length - last.parent.end) // self.page_size + 1]"),
    Mutant("insert does not split", TREE, "        if path and path[-1].end != reached:\n            path[-1] = self._split(path[-1], reached)\n", ""),
    Mutant("insert goes on below the lower half", TREE, "            path[-1] = self._split(path[-1], reached)\n", "            self._split(path[-1], reached)\n"),
    Mutant("insert does not use its path", TREE, "        for policy in self._policies:\n            policy.touch(path)\n        return Insertion", "        return Insertion"),
    Mutant("insert spares one page too few", TREE, "values[0][owned // page_size : present // page_size]", "values[0][owned // page_size + 1 : present // page_size]"),
    Mutant("insert forgets what is held", TREE, "return held.length, held.node, []", "return 0, self._roots[key.namespace], []"),
    Mutant("leaf takes values from the start", TREE, "values[i][first_page : length // self.page_size]", "values[i][: length // self.page_size - first_page]"),
    Mutant("leaf is not counted", TREE, "        counts[i] += len(value)\n", ""),
    Mutant("split forgets the locks", TREE, "        top.locks = bottom.locks\n", ""),
    Mutant("split forgets the policy", TREE, "            if not top.locks:\n                self._policies[i].add(upper)\n", ""),
    Mutant("split cuts values one page late", TREE, "_owned(bottom.value[:pages]), _owned(bottom.value[pages:])", "_owned(bottom.value[: pages + 1]), _owned(bottom.value[pages + 1 :])"),
    Mutant("split forgets the parent", TREE, "        lower.parent = upper\n", ""),
    Mutant("split forgets priority", TREE, "        upper.priority = lower.priority\n", ""),
    Mutant("split gives the upper half all hashes", TREE, "upper.hashes, lower.hashes = lower.hashes[:pages], lower.hashes[pages:]", "upper.hashes = lower.hashes"),
    Mutant("split is no change of version", TREE, "                self._split_slot(i, upper, lower, pages)\n        self._version += 1\n", "                self._split_slot(i, upper, lower, pages)\n"),
    # The tree: evicting, locking.
    Mutant("evict one page less", TREE, "target = self.evictable[component] - amount", "target = self.evictable[component] - amount + 1"),
    Mutant("evict one node more", TREE, "while self.evictable[component] > target and", "while self.evictable[component] >= target and"),
    Mutant("evict leaves an empty root", TREE, "                del self._roots[parent.namespace]\n", ""),
    Mutant("evict does not uncover the parent", TREE, "                        policy.exposed(parent)", "                        pass"),
    Mutant("evict takes locked parents along", TREE, "            if parent.locks:", "            if False:"),
    Mutant("evict is no change of version", TREE, "            nodes.append(node)\n            self._version += 1\n", "            nodes.append(node)\n"),
    Mutant("lock does not split", TREE, "            if node is not None and node.end != length:", "            if False:"),
    Mutant("lock trusts an outdated match", TREE, "where.version == self._version and", "True and"),
    Mutant("lock accepts pages cached anew", TREE, "if np.array_equal(self._values_to(path, match.length), match.pages):", "if True:"),
    Mutant("lock covers one node only", TREE, "                node = node.parent\n            self.evictable[i] -= moved", "                break\n            self.evictable[i] -= moved"),
    Mutant("unlock keeps the lock", TREE, "        self._hold(receipt, -1)\n", ""),
    Mutant("unlock makes nothing evictable", TREE, "                        policy.add(node)\n                        moved -= len(slot.value)\n", "                        moved -= len(slot.value)\n"),
    Mutant("second lock moves sizes again", TREE, "                    if before == 0:", "                    if step > 0:"),
    Mutant("receipt can be used twice", TREE, "        receipt.held = False\n", ""),
    Mutant("receipt survives a reset", TREE, "        self._epoch += 1\n", ""),
    # Recency.
    Mutant("touch from the root down", RECENCY, "        order = self._order\n        for node in reversed(path):", "        order = self._order\n        for node in path:"),
    Mutant("touch moves to the old end", RECENCY, "order.move_to_end(node)", "order.move_to_end(node, last=False)"),
    Mutant("youngest first", RECENCY, "next(iter(self._order), None)", "next(reversed(self._order), None)"),
    Mutant("ranked touch is ignored", RECENCY, "            if node in self._stamp:\n                self._renew(node)", "            pass"),
    Mutant("ranked exposure is ignored", RECENCY, "        if self.leaves_only:\n            self._push(node)", "        pass"),
    Mutant("highest priority first", RECENCY, "return node.priority", "return -node.priority"),
    Mutant("outdated heap entries count", RECENCY, "return self._stamp.get(node) == stamp and", "return node in self._stamp and"),
    # The cache.
    Mutant("duplicates are not freed", RADIX, "            allocator.release(duplicates.copy(), PageState.PRIVATE)\n", ""),
    Mutant("row keeps its freed duplicates", RADIX, "            table.write_pages(row, inserted.present // size - len(duplicates), inserted.kept)\n", ""),
    Mutant("row patched one page late", RADIX, "inserted.present // size - len(duplicates), inserted.kept", "inserted.present // size - len(duplicates) + 1, inserted.kept"),
    Mutant("old lock is not given back", RADIX, "        if old is not None:\n            self.tree.unlock(old)\n", ""),
    Mutant("finished request keeps its lock", RADIX, "            self.tree.unlock(req.lock)\n            req.lock = None", "            req.lock = None"),
    Mutant("finished request keeps its row", RADIX, "        table.free(row)\n", ""),
    Mutant("tail page is not freed", RADIX, "        if len(tail):\n            allocator.release(tail.copy(), PageState.PRIVATE)\n", ""),
    Mutant("tail starts one page early", RADIX, "tail = table.row_pages(row, shared, req.num_pages)", "tail = table.row_pages(row, max(shared - 1, 0), req.num_pages)"),
    Mutant("tail page is shared too", RADIX, "pages = table.row_pages(row, 0, req.kv_len // size)\n", "pages = table.row_pages(row, 0, -(-req.kv_len // size))\n        req.kv_len = -(-req.kv_len // size) * size\n"),
    Mutant("evicted pages are not freed", RADIX, "            self.token_to_kv_pool_allocator.release(pages, PageState.TREE)\n", "            pass\n"),
    Mutant("evict rounds down", RADIX, "self.tree.evict(-(-num_tokens // self.page_size))", "self.tree.evict(num_tokens // self.page_size)"),
    Mutant("tree claims nothing", RADIX, "            self.token_to_kv_pool_allocator.transfer(pages, PageState.PRIVATE, PageState.TREE)", "            pass"),
    Mutant("eviction is no event", RADIX, "        if self.enable_kv_cache_events and gone.nodes:\n            self._events.append(_removed(gone))\n", ""),
    Mutant("disabled cache looks up", RADIX, "self.tree.match(key[:0] if self.disable else key)", "self.tree.match(key)"),
    Mutant("disabled cache shares", RADIX, "        shared = 0\n        if not self.disable:", "        shared = 0\n        if True:"),
    # Pages.
    Mutant("double free passes", OWNERS, "        if not is_owned:\n", "        if False:\n"),
    Mutant("release does not change the owner", BASE, "            self._owners.assign(rows, PageState.FREE)\n", ""),
    Mutant("alloc does not change the owner", BASE, "        pages = self._free.take(n)\n        self._owners.assign(pages, PageState.PRIVATE)\n", "        pages = self._free.take(n)\n"),
    Mutant("alloc one page too many allowed", BASE, "        if n > self._free.count:\n            return None\n        pages = self._free.take(n)", "        if n > self._free.count + 1:\n            return None\n        pages = self._free.take(n)"),
    Mutant("pending pages are not drained", BASE, "            self._join_pending()\n            self.merge_and_sort_free()\n", "            self.merge_and_sort_free()\n"),
    Mutant("groups do not nest", BASE, "        self._group_depth += 1\n", "        self._group_depth = 1\n"),
    Mutant("freed pages are not sorted", BASE, "            pages.sort()\n", ""),
    Mutant("restore forgets the owners", BASE, "        self._owners.assign(taken, PageState.FREE)\n", ""),
    Mutant("a free leaves snapshots alive", BASE, "        self._snapshots = []\n        if self.free_order is FreeOrder.LIFO:", "        if self.free_order is FreeOrder.LIFO:"),
    Mutant("decode takes a page one token late", BASE, "starts_page = prefix_lens % self.page_size == 0", "starts_page = seq_lens % self.page_size == 0"),
    Mutant("extend counts pages too low", BASE, "pages_of(seq_lens, self.page_size) - pages_of(prefix_lens, self.page_size)", "seq_lens // self.page_size - prefix_lens // self.page_size"),
    Mutant("extend starts at the last slot", EXPAND, "first_slot[tail_run] = last_loc + 1", "first_slot[tail_run] = last_loc"),
    Mutant("pages go to the wrong rows", EXPAND, "is_page[tail_run] = False", "is_page[last_run] = False"),
    Mutant("ring forgets to wrap", RING, "        self._pages[: max(len(pages) - until_wrap, 0)] = pages[until_wrap:]\n", ""),
    # The table and keys.
    Mutant("row freed twice passes", TABLE, "        if self._is_free[rows].any():", "        if False:"),
    Mutant("rows are handed out last in first out", TABLE, "self._free.popleft()", "self._free.pop()"),
    Mutant("extended key keeps its old end", KEY, "packed = self.packed[: TOKEN_BYTES * self.length] + pack(token_ids)", "packed = self.packed + pack(token_ids)[:0] + bytes(TOKEN_BYTES * len(token_ids))"),
    Mutant("namespaces are not told apart", KEY, 'self.namespace = b"" if extra_key is None else', 'self.namespace = b"" if extra_key is not None else'),
    Mutant("match result is for a page later", "caches/base.py", "return expand_pages(self.pages, self.page_size)", "return expand_pages(self.pages, self.page_size)[::-1][::-1] + 0 * self.page_size + (self.page_size > 1)"),
    # The manager, its plans and the device table: driven with a real step.
    *(
        Mutant(name, file, old, new, "tests.model.manager_driver", 10)
        for name, file, old, new in [
            ("plan writes pages one entry late", MANAGER, "self.req_to_token_pool.write_pages(self._row(request), request.num_pages, fresh", "self.req_to_token_pool.write_pages(self._row(request), request.num_pages + 1, fresh"),
            ("plan does not count its pages", MANAGER, "                request.num_pages += count\n", ""),
            ("all requests get the first pages", MANAGER, "                start += count\n", ""),
            ("run does not commit", MANAGER, "            request.kv_len = length\n", ""),
            ("run sends no table changes", MANAGER, "changes = self.req_to_token_pool.take_changes(plan.bucket.changes)", "changes = self.req_to_token_pool.take_changes(0)"),
            ("run keeps the old table", MANAGER, "self.pool, self.table, out = result", "self.pool, _, out = result"),
            ("last slot is one too far", MANAGER, "page, offset = divmod(request.kv_len - 1, self.page_size)", "page, offset = divmod(request.kv_len - 1, self.page_size)\n        offset += 1"),
            ("cancel keeps the pages", MANAGER, "                self.allocator.release(extra.copy(), PageState.PRIVATE)\n                request", "                request"),
            ("cancel frees a page too many", MANAGER, "            keep = self._pages_of(request.kv_len)\n", "            keep = max(self._pages_of(request.kv_len) - 1, 0)\n"),
            ("admit does not lock", MANAGER, "            lock = self.cache.inc_lock_ref(found)\n", "            lock = self.cache.inc_lock_ref(self.cache.match_prefix(request.key[:0]))\n"),
            ("admit does not undo its lock", MANAGER, "            undo.callback(self.cache.dec_lock_ref, lock)\n", ""),
            ("admit computes nothing", MANAGER, "cap = request.num_tokens - 1", "cap = request.num_tokens"),
            ("admit loads back one token early", MANAGER, "buffer[:, start:stop]", "buffer[:, max(start - 1, 0) : max(start - 1, 0) + stop - start]"),
            ("admit does not load back", MANAGER, "        self.pool = self.pool.load_cpu_copy(rest, slots)\n", ""),
            ("retract copies the wrong page", MANAGER, "expand_pages(pages, self.page_size)[: request.kv_len]", "expand_pages(pages[::-1], self.page_size)[: request.kv_len]"),
            ("released request stays in the list", MANAGER, "        del self.running[row]\n", ""),
            ("released request keeps its length", MANAGER, "        request.state = state\n        request.kv_len = 0\n", "        request.state = state\n"),
            ("decode computes the token before", MANAGER, "[request.output_ids[-1:] or", "[request.output_ids[:1] or"),
            ("table changes are half taken", TABLE, "                self._changed.append((row, cut, stop))\n", ""),
            ("table changes miss their last entry", TABLE, "taken.append((row, first, cut))", "taken.append((row, first, max(first, cut - 1)))"),
            ("positions start at nought", STEP, "positions = token + (seq_len - end)[request]", "positions = token - (end - seq_len + prefix_len)[request]"),
            ("requests are told apart one token late", STEP, "ends_here = jnp.zeros(bucket.tokens, jnp.int32).at[end].add", "ends_here = jnp.zeros(bucket.tokens, jnp.int32).at[end + 1].add"),
            ("decode stands one further", STEP, "positions = jnp.maximum(seq_len - 1, 0)", "positions = seq_len"),
        ]
    ),
]  # fmt: skip


def is_caught(mutant: Mutant, ops: int) -> tuple[bool, str]:
    """Runs a driver over the mutated package; returns whether it failed, and its last line."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        shutil.copytree(ROOT / "jaxcache", place / "jaxcache", ignore=shutil.ignore_patterns("__pycache__"))
        (place / "tests").symlink_to(ROOT / "tests")
        mutant.apply(place / "jaxcache")
        command = [sys.executable, "-m", mutant.driver, "--ops", str(ops), "--seed", "0"]
        environment = {**os.environ, "PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            return True, "hangs"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line] or ["no violation"]
    return done.returncode != 0, lines[-1][:110]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--ops", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    started = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda mutant: is_caught(mutant, arguments.ops // mutant.share), chosen))
    missed = 0
    for mutant, (caught, why) in zip(chosen, results, strict=True):
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {mutant.name:45} {why}")
    print(f"{len(chosen) - missed} of {len(chosen)} caught in {time.perf_counter() - started:.0f} s")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
