"""An image changes what its tokens are, and nothing before them.

A digest was part of the whole namespace, so that turn n of a chat, which adds an image, found nothing of turn n - 1,
the text included; and digests of 0 or 1 byte were accepted, of which every 256th image is another's.
"""

from __future__ import annotations

import pytest

import jaxcache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import BlockStored, EventBatch
from jaxcache.index.hashing import content_digest
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.media import MediaRange
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import record, replay
from jaxcache.request import Request, RequestState
from tests.model.manager_driver import small_manager, write_step
from tests.snapshot.caches import MODEL
from tests.support.recorded_lives import FLAVOURS, make_config

CAT, DOG = content_digest("cat"), content_digest("dog")
TEXT, IMAGE = list(range(100, 117)), [7] * 9  # 7: the placeholder


def nothing(pool, batch):
    return pool, None


def run(manager, step, plan):
    assert plan is not None
    manager.run(step, plan)


def serve(manager, rid, tokens, media=(), end=True):
    """Computes a prompt; returns the request."""
    request = Request(rid, tokens, media=media)
    assert manager.admit(request) is not None
    while request.kv_len < request.num_tokens:
        run(manager, nothing, manager.extend([(request, manager.next_chunk(request, 16))]))
    manager.check_memory()
    if end:
        manager.finish(request)
    return request


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_a_turn_with_an_image_finds_the_turns_before_it(flavour):
    manager = init_memory_pool_and_cache(make_config(flavour))
    page = manager.page_size
    serve(manager, "turn 1", TEXT)
    serve(manager, "turn 1 again", TEXT)
    found = serve(manager, "turn 1 once more", [*TEXT, 1]).cached_tokens
    image = [MediaRange(len(TEXT), len(TEXT) + len(IMAGE), CAT)]
    second = [*TEXT, *IMAGE, 50, 51]
    turn_2 = serve(manager, "turn 2", second, image)
    assert turn_2.cached_tokens == found > 0
    third = [*second, 52, 53, *IMAGE, 54]
    both = [*image, MediaRange(len(second) + 2, len(second) + 2 + len(IMAGE), DOG)]
    turn_3 = serve(manager, "turn 3", third, both)
    assert turn_3.cached_tokens > turn_2.cached_tokens
    assert serve(manager, "turn 3 again", third, both).cached_tokens >= turn_3.cached_tokens
    begin = len(TEXT) // page * page
    for media in ([], [MediaRange(len(TEXT), len(TEXT) + len(IMAGE), DOG)]):
        assert serve(manager, "other", third, media).cached_tokens <= begin


def test_images_stay_apart_whatever_becomes_of_a_request():
    """Chunks, sampled tokens, retraction and a host copy."""
    manager = small_manager(page_size=4, num_pages=40)
    tokens = [1, 2, 3, 4, 5, 7, 7, 7, 7, 7, 7, 6, 6]
    image = [MediaRange(5, 11, CAT)]
    request = Request("r", tokens, media=image)
    manager.admit(request)
    for _ in range(2):
        run(manager, write_step, manager.extend([(request, 6)]))
        manager.check_memory()
    run(manager, write_step, manager.extend([(request, 1)]))
    for token in range(5):
        request.output_ids.append(token)
        run(manager, write_step, manager.decode([request]))
    request.output_ids.append(9)
    manager.retract(request, offload=True)
    assert manager.admit(Request("other", [*tokens, 0, 1, 2, 3], media=[MediaRange(5, 11, DOG)])) == 4
    assert manager.admit(Request("same", [*tokens, 0, 1, 2, 3], media=image)) == 16
    other = Request("not its copy", tokens)
    with pytest.raises(ArgumentError, match="its own tokens"):
        other.cpu_copy = request.cpu_copy
    manager.cache.evict(100)
    assert manager.admit(request) == 18
    manager.check_memory()


def test_what_is_wrong_is_refused_before_there_is_a_request():
    with pytest.raises(ArgumentError, match="overlap"):
        Request("r", [0] * 9, media=[MediaRange(0, 4, CAT), MediaRange(3, 5, DOG)])
    with pytest.raises(ArgumentError, match="ends after the 9 tokens"):
        Request("r", [0] * 9, media=[MediaRange(4, 10, CAT)])
    for digest in (b"", b"x"):
        with pytest.raises(ArgumentError, match="at least 2 bytes"):
            MediaRange(0, 4, digest)
        with pytest.raises(ArgumentError, match="at least 2 bytes"):
            Request("r", [0] * 9, Namespace(media=(digest,)))
    request = Request("r", [0] * 9, media=[MediaRange(4, 6, CAT)])
    with pytest.raises(RequestStateError, match="media of request r is fixed"):
        request.media = ()
    assert (request.media, request.state) == ((MediaRange(4, 6, CAT),), RequestState.WAITING)


def test_events_name_blocks_by_their_images():
    manager = small_manager(page_size=4, num_pages=40, enable_kv_cache_events=True)
    tokens = [1] * 6 + [7] * 8 + [2] * 6
    media = {digest: [MediaRange(6, 14, digest)] for digest in (CAT, DOG)}
    for digest in (CAT, DOG):
        request = Request("r", tokens, media=media[digest])
        manager.admit(request)
        run(manager, write_step, manager.extend([(request, len(tokens) - request.kv_len)]))
        manager.finish(request)
    events = manager.cache.take_events()
    keys = [event.extra_keys for event in events if isinstance(event, BlockStored) and event.extra_keys]
    assert keys == [[[digest.hex()], None, None, None] for digest in (CAT, DOG)]
    consumer = EventConsumer()
    consumer.receive(0, EventBatch(0.0, events))
    for found, ranges in ((20, media[CAT]), (20, media[DOG]), (4, [])):
        assert consumer.prefix_len(RadixKey(tokens, media=ranges), 4) == found
    assert len(consumer.blocks()) == 1 + 2 * 4
    manager.cache.evict(100)
    consumer.receive(1, EventBatch(1.0, manager.cache.take_events()))
    assert not consumer.blocks()


def test_a_log_and_a_snapshot_keep_them(tmp_path):
    config = make_config("full")
    memory = record(config)
    image = [MediaRange(len(TEXT), len(TEXT) + len(IMAGE), CAT)]
    tokens = [*TEXT, *IMAGE, 50, 51]
    serve(memory, "a", tokens, image)
    serve(memory, "b", tokens)
    again = replay(memory.log)
    assert fingerprint(again) == fingerprint(memory)
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    restored = jaxcache.load_snapshot(tmp_path, config, model=MODEL)
    assert fingerprint(restored) == fingerprint(memory)
    one, other = (RadixKey(tokens, media=ranges) for ranges in (image, []))
    for cache in (again.cache, restored.cache):
        found = [cache.match_prefix(key).pages.tolist() for key in (one, other)]
        assert found == [memory.cache.match_prefix(key).pages.tolist() for key in (one, other)]
        assert found[0] != found[1]
        assert len(found[0]) == len(found[1]) == len(tokens) // memory.page_size
