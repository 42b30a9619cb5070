"""Random lives of an allocator against the list model: same slots, same free list, same owners after every call."""

from __future__ import annotations

from hypothesis import settings

from tests.support.allocator_lives import AllocatorLife

TestAllocatorLife = AllocatorLife.TestCase
TestAllocatorLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
