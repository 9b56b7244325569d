"""Files that survive: written completely or not at all, locked, read with tolerance; progress; the signal to stop.

Imports nothing of byolt; everything else may import it. Begin with `atomic.py`. `storage/` is about object storage.
"""
