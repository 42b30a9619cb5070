"""A tree under random operations, its events on a channel that drops, repeats and reorders, and a consumer at the end.

    python -m tests.observe.event_driver --ops 1000000      every mix of components, with and without faults

At every checkpoint the consumer knows exactly the blocks of the tree, whose names are worked out here from the tokens
alone; where a loss could not be healed it says so, and knows a part of them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from dataclasses import dataclass, fields

import numpy as np

from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import EventBatch, EventQueue, block_name
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.tree import RadixTree

STATE = Component("state", 1, spans=False)
MIXES = {
    "full": (FULL,),
    "window": (FULL, Component("window", 6)),
    "state": (FULL, STATE),
    "window+state": (FULL, Component("window", 4), STATE),
}
SPACES = (None, "tenant", Namespace(lora_id="a"))


@dataclass(frozen=True)
class Faults:
    """Chances of what happens to a batch.

    Attributes:
      drop: It never arrives.
      repeat: It arrives again, now and once more later.
      delay: It arrives some batches late.
      crowd_out: The publisher had no room for it: it is not there for replay either.
      restart: The publisher begins anew, and says first what is in the tree.
      buffer: Batches that can be replayed.
      asks: Whether the consumer can ask for a replay.
    """

    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    crowd_out: float = 0.0
    restart: float = 0.0
    buffer: int = 1000
    asks: bool = True


NO_FAULTS = Faults()
HEALABLE = Faults(drop=0.05, repeat=0.05, delay=0.05)
HARSH = Faults(drop=0.05, repeat=0.05, delay=0.05, crowd_out=0.01, restart=0.01, buffer=20)
DEAF = Faults(drop=0.01, repeat=0.05, delay=0.05, asks=False)


class Channel:
    """A publisher's sequence numbers and replay buffer, and what its messages go through."""

    def __init__(self, rng: random.Random, faults: Faults):
        self.rng, self.faults = rng, faults
        self.buffer: deque[tuple[int, EventBatch]] = deque(maxlen=faults.buffer)
        self.late: list[tuple[int, tuple[int, EventBatch]]] = []
        self.seq = self.sent = self.dropped = 0
        self.consumer = EventConsumer(self.replay if faults.asks else None)

    def replay(self, start: int) -> list[tuple[int, EventBatch]]:
        return [message for message in self.buffer if message[0] >= start]

    def restart(self, events: list) -> None:
        """Begins with `events`: at a higher number, as our publisher does, or at 0, as others do.

        At 0 the first message arrives. If it did not, a publisher that is soon as far as the old one was would look
        like the old one: the protocol cannot tell.
        """
        self.buffer.clear()
        if self.rng.random() < 0.5:
            self.seq += 1000
            self.send(events)
        else:
            self.seq = 1
            self.sent += 1
            self.buffer.append((0, EventBatch(float(self.sent), events)))
            self.consumer.receive(*self.buffer[0])

    def send(self, events: list) -> None:
        if not events:
            return
        roll, faults = self.rng.random, self.faults
        self.sent += 1
        message = (self.seq, EventBatch(float(self.sent), events))
        self.seq += 1
        if roll() < faults.crowd_out:
            self.dropped += 1
            return
        self.buffer.append(message)
        if roll() < faults.drop:
            self.dropped += 1
        elif roll() < faults.delay:
            self.late.append((self.sent + self.rng.randint(1, 5), message))
        else:
            self.consumer.receive(*message)
        if roll() < faults.repeat:
            self.consumer.receive(*message)
            self.late.append((self.sent + self.rng.randint(1, 30), message))
        self.deliver(self.sent)

    def deliver(self, until: float) -> None:
        due = [message for when, message in self.late if when <= until]
        self.late = [entry for entry in self.late if entry[0] > until]
        for message in due:
            self.consumer.receive(*message)


class Life:
    """A tree, and what it says of itself.

    Args:
      seed: Of everything random.
      components: Of the tree.
      page_size: Tokens a page.
      faults: Of the channel.
      queue_blocks: Room of the event queue; little of it overflows.
    """

    def __init__(self, seed: int, components: tuple, page_size: int, faults: Faults, queue_blocks: int = 1 << 20):
        self.rng = random.Random(seed)
        self.tree = RadixTree(page_size, components, with_hashes=True)
        self.queue = EventQueue(self.tree, queue_blocks)
        self.channel = Channel(self.rng, faults)
        self.keys = deque([RadixKey([0])], maxlen=40)
        self.locks: deque = deque()
        self.next_value = 1
        self.checked = self.losses = 0

    def some_key(self) -> RadixKey:
        rng = self.rng
        base = rng.choice(self.keys)
        tail = np.frombuffer(rng.randbytes(rng.randint(0, 3 * self.tree.page_size + 2)), np.uint8) % 3
        key = base[: rng.randint(0, base.length)].extended(tail.astype(np.int32))
        return key if rng.random() < 0.8 else RadixKey(key.token_ids, rng.choice(SPACES))

    def insert(self) -> None:
        key = self.some_key()
        pages = key.length // self.tree.page_size
        values = []
        for component in self.tree.components:
            count = pages if component.spans else min(pages, 1)
            values.append(np.arange(self.next_value, self.next_value + count, dtype=np.int32))
            self.next_value = (self.next_value + count) % (1 << 30) + 1
        inserted = self.tree.insert(key, values)
        for node in inserted.added:
            self.queue.stored(node, key.namespace)
        self.keys.append(key)
        if self.rng.random() < 0.2:
            self.locks.append(self.tree.lock(inserted))

    def lookup(self) -> None:
        match = self.tree.match(self.some_key())
        if self.rng.random() < 0.3:
            self.locks.append(self.tree.lock(match))

    def unlock(self) -> None:
        if self.locks:
            self.tree.unlock(self.locks.popleft())

    def evict(self) -> None:
        component = self.rng.randrange(len(self.tree.components))
        self.queue.removed(self.tree.evict(self.rng.randint(1, 12), component))

    def reset(self) -> None:
        self.tree.reset()
        self.locks.clear()
        self.queue.cleared()

    def resident(self) -> set[int]:
        """Names of the blocks in the tree, from the tokens and nothing else."""
        names: set[int] = set()
        page_bytes = 4 * self.tree.page_size
        for namespace, root in self.tree.roots.items():
            todo = [(child, b"") for child in root.children.values()]
            while todo:
                node, above = todo.pop()
                path = above + node.key
                digests = page_hashes(path, page_bytes, namespace_seed(namespace))
                names.update(map(block_name, digests[len(above) // page_bytes :]))
                todo += [(child, path) for child in node.children.values()]
        return names

    def say(self) -> None:
        """Sends what has happened. What the consumer lost for good is said anew, as an engine would on a complaint."""
        if self.rng.random() < self.channel.faults.restart:
            self.queue.take()
            self.channel.restart(self.queue.snapshot())
        elif not self.channel.consumer.is_complete and self.rng.random() < 0.1:
            self.queue.take()
            self.channel.send(self.queue.snapshot())
        else:
            self.channel.send(self.queue.take())

    def check(self) -> None:
        """All that is on its way arrives; then the consumer knows the tree, or knows that it does not."""
        self.say()
        self.channel.deliver(float("inf"))
        consumer, resident = self.channel.consumer, self.resident()
        consumer.catch_up()
        if consumer.is_complete and consumer.next_seq == self.channel.seq:
            assert consumer.blocks() == resident
            self.checked += 1
        elif consumer.next_seq == self.channel.seq:
            assert consumer.blocks() <= resident
        else:
            assert self.channel.dropped, "nothing was lost, and yet the consumer waits for something"
        self.losses = consumer.losses

    def run(self, operations: int, every: int = 400) -> Life:
        acts = random.Random(self.rng.random()).choices(
            [self.insert, self.lookup, self.unlock, self.evict, self.say, self.reset],
            [35, 15, 15, 15, 20, 0.02],
            k=operations,
        )
        for i, act in enumerate(acts):
            act()
            if i % every == every - 1:
                self.check()
        self.check()
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ops", type=int, default=1_000_000, help="tree operations in all")
    options = parser.parse_args()
    cases = [(mix, faults) for mix in MIXES for faults in (NO_FAULTS, HEALABLE, HARSH, DEAF)]
    for i, (mix, faults) in enumerate(cases):
        started = time.perf_counter()
        life = Life(i, MIXES[mix], (1, 2, 4)[i % 3], faults).run(options.ops // len(cases))
        shown = ", ".join(f"{field.name} {getattr(faults, field.name)}" for field in fields(faults))
        seconds = time.perf_counter() - started
        print(f"{mix}; {shown}: {life.checked} times the same, {life.losses} losses, {seconds:.1f} s")


if __name__ == "__main__":
    main()
