"""Events of real caches of every flavour, whose requests share, retract and finish in random order."""

from __future__ import annotations

import pytest

from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import BlockStored, EventBatch, EventQueue, block_name
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from tests.support.random_lives import WEIGHTS, RandomLife

SEEDS = [*range(40), 69]


def resident(tree):
    """Names of the blocks in a tree, from the elements of its keys alone."""
    names = set()
    page_bytes = tree.element_bytes * tree.page_size
    for namespace, root in tree.roots.items():
        todo = [(child, b"") for child in root.children.values()]
        while todo:
            node, above = todo.pop()
            path = above + node.key
            names.update(block_name(digest) for digest in page_hashes(path, page_bytes, namespace_seed(namespace)))
            todo += [(child, path) for child in node.children.values()]
    return names


def with_events(seed):
    """A random life whose cache says what happens in it."""
    life = RandomLife(seed)
    cache = life.life.cache
    cache.tree.with_hashes = True
    cache._kept.events = EventQueue(cache.tree)
    return life, cache


@pytest.mark.parametrize("seed", SEEDS)
def test_a_consumer_knows_what_is_cached(seed):
    life, cache = with_events(seed)
    consumer = EventConsumer()
    said = 0
    for i, operation in enumerate(life.rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=300)):
        life.act(operation)
        if i % 5 == 4:
            events = cache.take_events()
            said += len(events)
            consumer.receive(consumer.next_seq, EventBatch(float(i), events))
            assert consumer.blocks() == resident(cache.tree)
    assert said or life.shape.disable or not list(cache.tree.nodes())


def test_every_flavour_is_among_them():
    shapes = [with_events(seed)[0].shape for seed in SEEDS]
    flavours = {(shape.window is not None, shape.has_states, shape.is_eagle) for shape in shapes}
    assert len(flavours) == 8


def test_tokens_of_an_eagle_cache_are_the_first_of_each_pair():
    for seed in SEEDS:
        life, cache = with_events(seed)
        if life.shape.is_eagle and not life.shape.disable:
            for operation in life.rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=100):
                life.act(operation)
            for event in cache.take_events():
                if isinstance(event, BlockStored):
                    assert len(event.token_ids) == len(event) * event.block_size
                    assert len(event.block_hashes) == len(event)
