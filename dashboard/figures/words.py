"""Numbers as people read them; in stageline.runtime.words, where the commands reach them too."""

from stageline.runtime.words import ago, change, clock, count, counted, figure, rate, seconds, share, size

__all__ = ["ago", "change", "clock", "count", "counted", "figure", "rate", "seconds", "share", "size"]
