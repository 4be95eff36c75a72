"""A stream that changes its size while it runs: which pictures are of the size it has now."""

from __future__ import annotations

import numpy as np

from services.ingest.sources.port import Source
from shared.contracts.commands import NoSource, TakeStream


class Sizing:
    """Pictures that were fitted to the size before, and come only now, belong to no chunk: they are dropped as resized."""

    def __init__(self, take: TakeStream) -> None:
        self.width, self.height = take.width, take.height
        self._from_text = isinstance(take.spec.source, NoSource)

    def adopt(self, take: TakeStream, source: Source | None) -> bool:
        """A newer assignment: whether its size is another one. The source fits to it from its next picture on."""
        if (take.width, take.height) == (self.width, self.height):
            return False
        self.width, self.height = take.width, take.height
        if source is not None:
            source.resize(self.width, self.height)
        return True

    def fits(self, pixels: np.ndarray) -> bool:
        """Whether a picture has the stream's size."""
        return self._from_text or pixels.shape[:2] == (self.height, self.width)
