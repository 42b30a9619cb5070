"""The oracle of the two-sided allocator: two list models and a dict from full page to window page."""

from __future__ import annotations

import dataclasses

from tests.pages.model import FREE, PENDING, Model


@dataclasses.dataclass
class SWAModel(Model):
    """The full side is the model itself. Pages of a pair have one owner, so the dict tells that of a window page."""

    num_windows: int = 1

    def clear(self) -> None:
        self.window = Model(self.num_windows, self.page_size, self.lifo, self.need_sort)
        self.window_of: dict[int, int] = {}
        self.moves = 0  # Counts what ends marks, beside the reorders of both sides.
        super().clear()

    def take(self, n: int, trigger: int, without_window: int = 0) -> list[int] | None:
        """Each side sorts when it is short itself, and neither when one of them cannot give what is wanted."""
        wanted = n - without_window
        if not (self.has(n) and self.window.has(wanted)):
            return None
        pages, windows = super().take(n, trigger), self.window.take(wanted, wanted)
        assert pages is not None and windows is not None
        self.window_of |= dict(zip(pages[without_window:], windows, strict=True))
        return pages

    def release(self, pages: list[int]) -> None:
        super().release(pages)
        self.free_windows(pages)

    def free_windows(self, pages: list[int]) -> list[int]:
        """Pages without a window are passed over. Returns the window pages that went."""
        windows = [self.window_of.pop(page) for page in pages if page in self.window_of]
        self.window.depth = self.depth  # A free group is one of both sides.
        self.window.release(windows)
        return windows

    def move_windows(self, source: list[int], target: list[int]) -> None:
        for old, new in zip(source, target, strict=True):
            self.window_of[new] = self.window_of.pop(old)
        self.moves += 1

    def merge_and_sort(self) -> None:
        super().merge_and_sort()
        self.window.merge_and_sort()

    def epoch(self) -> tuple[int, int, int]:
        """A mark is good only while this stays the same."""
        return self.reordered, self.window.reordered, self.moves

    def window_states(self) -> list[int]:
        """The owner of every window page: that of its full page, or nobody."""
        full_of = {window: page for page, window in self.window_of.items()}
        return [
            self.owner[full_of[w]] if w in full_of else PENDING if w in self.window.pending else FREE
            for w in range(1, self.num_windows + 1)
        ]

    def translate(self, slot: int) -> int:
        """The window slot of a full slot, 0 where there is none."""
        window = self.window_of.get(slot // self.page_size)
        return 0 if window is None else window * self.page_size + slot % self.page_size
