"""Every public name of SGLang's `mem_cache` (0.5.2) and of pymllm's is here, replaced (docs/migrating.md), or to come.

Where both have a name, `jaxcache.X` is SGLang's, driven by requests, and `jaxcache.index.X` is pymllm's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxcache
import jaxcache.compat
import jaxcache.errors
import jaxcache.index

SIZES = "evictable_size protected_size total_size"
SIDES = "full_evictable_size full_protected_size swa_evictable_size swa_protected_size"
LOCKS = "inc_lock_ref dec_lock_ref"
REQUESTS = "cache_finished_req cache_unfinished_req"
TREE = f"reset match_prefix insert evict pretty_print all_values_flatten {LOCKS} {REQUESTS} {SIZES}"
BUFFERS = "get_key_buffer get_value_buffer get_kv_buffer set_kv_buffer"
COPIES = "get_cpu_copy load_cpu_copy"
INFOS = "get_kv_size_bytes get_contiguous_buf_infos"
POOL = f"{BUFFERS} {INFOS} {COPIES} maybe_get_custom_mem_pool"
BACKUP = "backup_state restore_state"
FLAT_PAGES = "get_flat_data_page get_dummy_flat_data_page set_from_flat_data_page"
STORAGE = "get batch_get set batch_set exists delete clear"
HOST = f"get_size_per_token init_kv_buffer load_to_device_per_layer backup_from_device_all_layer {FLAT_PAGES}"
HOST_STATES = "get_state is_reserved is_protected is_synced is_backup update_backup update_prefetch update_synced"
NO_LOCK = "get_lru_no_lock get_leaf_lru_no_lock get_prev_no_lock get_prev_leaf_no_lock"

SGLANG = {
    "BaseTokenToKVPoolAllocator": f"alloc alloc_extend alloc_decode free clear available_size get_kvcache debug_print "
    f"free_group_begin free_group_end merge_and_sort_free {BACKUP} {COPIES}",
    "PagedTokenToKVPoolAllocator": f"alloc alloc_extend alloc_decode free clear {COPIES}",
    "SWATokenToKVPoolAllocator": "alloc free free_swa clear available_size full_available_size swa_available_size "
    f"size_full size_swa translate_loc_from_full_to_swa get_kvcache debug_print {BACKUP}",
    "TokenToKVPoolAllocator": f"alloc free clear available_size {COPIES}",
    "AscendPagedTokenToKVPoolAllocator": "alloc_extend alloc_decode",
    "BasePrefixCache": f"reset match_prefix evict pretty_print take_events init_load_back ready_to_load_host_cache "
    f"check_hicache_events {LOCKS} {REQUESTS} {SIZES} {SIDES}",
    "ChunkCache": f"reset match_prefix evict pretty_print {LOCKS} {REQUESTS}",
    "SWAChunkCache": "evict evict_swa",
    "HiCacheFile": STORAGE,
    "HiCacheStorage": f"{STORAGE} batch_exists",
    "HiRadixCache": "reset match_prefix insert evict evict_host evictable_size get_height clear_storage_backend "
    "write_backup write_backup_storage writing_check loading_check load_back init_load_back ready_to_load_host_cache "
    "check_hicache_events drain_storage_control_queues can_terminate_prefetch check_prefetch_progress "
    "prefetch_from_storage",
    "LoRAKey": "__len__ token_ids",
    "LoRARadixCache": f"{TREE} match_prefix_with_lora_id",
    "LoRATreeNode": "evicted __lt__",
    "KVCache": f"{BUFFERS} {COPIES} register_layer_transfer_counter",
    "MHATokenToKVPool": f"{POOL} move_kv_cache",
    "MLATokenToKVPool": f"{POOL} set_mla_kv_buffer",
    "SWAKVPool": f"{BUFFERS} {INFOS} translate_loc_from_full_to_swa",
    "AscendTokenToKVPool": "get_contiguous_buf_infos set_kv_buffer",
    "AscendMLAPagedTokenToKVPool": f"{BUFFERS} {INFOS}",
    "DoubleSparseTokenToKVPool": f"{BUFFERS} get_label_buffer",
    "ReqToTokenPool": "req_to_token write available_size alloc free clear free_slots",
    "HostKVCache": f"{HOST} {HOST_STATES} protect_write protect_load complete_io clear available_size alloc free",
    "MemoryStateInt": "IDLE RESERVED PROTECTED SYNCED BACKUP",
    "MHATokenToKVPoolHost": f"{HOST} k_buffer v_buffer get_ksize_per_token get_buffer_meta get_buffer_with_hash",
    "MLATokenToKVPoolHost": f"{HOST} get_ksize_per_token get_buffer_meta get_buffer_with_hash",
    "MultiModalCache": "put has get clear __len__",
    "RadixCache": f"{TREE} take_events",
    "RadixCacheCpp": f"reset match_prefix evict pretty_print {LOCKS} {REQUESTS} {SIZES}",
    "SWARadixCache": f"{TREE} {SIDES} sanity_check full_lru_list_evictable_size swa_lru_list_evictable_size",
    "TreeNode": "evicted backuped protect_host release_host get_last_hash_value __lt__",
    "LRUList": f"reset_node_mru reset_node_and_parents_mru insert_mru remove_node in_list sanity_check {NO_LOCK} "
    "sanity_check_evictable_size",
    "MatchResult": "device_indices last_device_node last_host_node host_hit_length",
    # Not in its index of functions, but public in the same release, and what its scheduler does with them.
    "MambaPool": COPIES,
    "HybridReqToTokenPool": "alloc free",
    "MemoryManager": "check_memory get_token_info get_swa_token_info",
    "BlockStored": "block_hashes parent_block_hash token_ids block_size",
    "BlockRemoved": "block_hashes",
    "AllBlocksCleared": "",
}
PYMLLM = {
    "RadixKey": "token_ids extra_key __len__ __iter__ __getitem__ __repr__",
    "MatchResult": "indices last_node prefix_len mamba_branching_seqlen",
    "InsertResult": "prefix_len last_node mamba_exist",
    "EvictResult": "full_evicted swa_evicted mamba_evicted",
    "BasePrefixCache": f"reset match_prefix insert evict {LOCKS} {SIZES} swa_evictable_size swa_protected_size",
    "RadixCache": f"reset match_prefix insert evict {LOCKS} {SIZES} swa_evictable_size swa_protected_size supports_swa "
    "compute_node_hash pretty_print page_size sliding_window_size pool on_node_evict",
    "MambaRadixCache": f"reset match_prefix insert evict {LOCKS} {SIZES} mamba_evictable_size mamba_protected_size "
    "pretty_print page_size pool mamba_pool on_node_evict full_lru mamba_lru",
    "TreeNode": "evicted __lt__ hash_values swa_boundary_id",
    "MambaTreeNode": "evicted mamba_tombstone __lt__",
    "LRUList": "insert_mru remove touch_mru touch_node_and_parents_mru get_lru_leaf_unlocked get_lru_unlocked",
}
FUNCTIONS = {
    "SGLang": "alloc_extend_kernel alloc_decode_kernel alloc_extend_kernel_ascend get_hash_str get_child_key "
    "set_mla_kv_buffer_kernel set_mla_kv_buffer_triton copy_all_layer_kv_cache synchronized gen_swa_uuid "
    "init_memory_pool_and_cache",
    "pymllm": "hash_token_ids hash_to_int64 hash_bytes",
}
LATER = {"HiRadixCache", "HiCacheFile", "HiCacheStorage", "get_hash_str"}
LATER |= {"BasePrefixCache.init_load_back", "BasePrefixCache.ready_to_load_host_cache"}
LATER |= {"BasePrefixCache.check_hicache_events"}
"""The host and storage tiers."""

ROOT = Path(__file__).resolve().parent.parent
_SPAN = re.compile(r"`([^`]+)`")


def table() -> list[list[str]]:
    """The cells of the table of replaced names in docs/migrating.md, row by row."""
    words = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    part = words.split("## SGLang and pymllm: names that were replaced")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return rows[2:]  # without the head and the line below it


def replaced() -> set[str]:
    """Old names that the table accounts for: classes, functions, `Class.method`, and attributes of any class."""
    return {name for old, *_ in table() for name in _SPAN.findall(old)}


def attributes(owner: type) -> set[str]:
    """What the instances of a class have, as far as the class says so."""
    source = {name for part in owner.__mro__ for name in inspect.get_annotations(part)}
    documented = {
        match
        for part in owner.__mro__
        for section in re.findall(r"\n( *)Attributes:\n(.*?)(?:\n\s*\n|\Z)", part.__doc__ or "", re.DOTALL)
        for match in re.findall(r"^\s+(\w+)(?:, \w+)*:", section[1], re.MULTILINE)
    }
    return set(dir(owner)) | source | documented


def expected() -> Iterator[tuple[object, str, str]]:
    """Every old name: where it is looked for, the class or function, and the method, if it is one."""
    for module, classes in ((jaxcache, SGLANG), (jaxcache.index, PYMLLM)):
        for name, members in classes.items():
            for member in ["", *members.split()]:
                yield module, name, member
    for names in FUNCTIONS.values():
        for name in names.split():
            yield jaxcache, name, ""


def exists(module: object, name: str, member: str) -> bool:
    owner = getattr(module, name, None)
    return owner is not None and (not member or member in attributes(owner))


@pytest.mark.parametrize("project", ["jaxcache", "jaxcache.index"])
def test_every_name_is_here_or_accounted_for(project):
    gone = replaced() | LATER
    missing = [
        f"{project}.{name}.{member}".strip(".")
        for module, name, member in expected()
        if module.__name__ == project
        and not exists(module, name, member)
        and not gone & {name, f"{name}.{member}", member or name}
    ]
    assert not missing, f"export them, or say in the table of docs/migrating.md what replaces them: {missing}"


def test_what_is_said_to_be_gone_is_not_here():
    """A row of the table, or an entry of `LATER`, that has become wrong."""
    here = {f"{name}.{member}".strip(".") for module, name, member in expected() if exists(module, name, member)}
    assert not replaced() & here
    assert not LATER & here


def test_what_the_table_points_to_is_there():
    """A dotted name in its second column is a module and what is in it, or a class and what it has."""
    checked = 0
    for row in table():
        for path in re.findall(r"`([a-zA-Z_]+(?:\.[a-zA-Z_]+)+)`", row[1]):
            head, *rest = path.split(".")
            found: object = getattr(jaxcache, head, None) if head[0].isupper() else None
            if found is None:
                module, rest = ".".join(["jaxcache", *path.split(".")[:-1]]), path.split(".")[-1:]
                found = importlib.import_module(module)
            for part in rest:
                owner = found if isinstance(found, type) else type(found)
                assert hasattr(found, part) or part in attributes(owner), path
                found = getattr(found, part, None)
            checked += 1
    assert checked >= 5


def test_the_documented_interface_is_small_and_sorted():
    assert len(jaxcache.__all__) <= 55
    assert jaxcache.__all__ == sorted(jaxcache.__all__)
    assert all(name in vars(jaxcache) for name in jaxcache.__all__), "loaded with the package"


def test_every_error_is_documented_and_says_so_in_its_name():
    errors = {value for value in vars(jaxcache.errors).values() if isinstance(value, type)}
    assert {error.__name__ for error in errors} <= set(jaxcache.__all__)
    assert all(error.__name__.endswith("Error") for error in errors)
    assert jaxcache.BrokenInvariant is jaxcache.BrokenInvariantError


def test_other_names_come_on_first_use_without_a_warning():
    names = {name for name, value in vars(jaxcache.compat).items() if not name.startswith("_")}
    names -= {"ascend", "host_pool", "pymllm", "pymllm_base", "sglang"}
    assert {"InsertResult", "EvictResult", "PagedTokenToKVPoolAllocator", "RadixKey"} <= names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(jaxcache, name) is getattr(jaxcache.compat, name) for name in names)
    assert names <= set(dir(jaxcache))
    assert jaxcache.InsertResult.__module__ == jaxcache.EvictResult.__module__ == "jaxcache.compat.pymllm_base"


def test_an_unknown_name_is_an_attribute_error():
    for name in ("Radixcache", "_joined", "ascend"):
        with pytest.raises(AttributeError, match=name):
            getattr(jaxcache, name)


def test_importing_the_package_loads_no_other_systems_names():
    source = "import sys, jaxcache; print([name for name in sys.modules if name.startswith('jaxcache.compat')])"
    out = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_the_version_is_that_of_what_is_installed():
    assert jaxcache.__version__ == importlib.metadata.version("jaxcache")
