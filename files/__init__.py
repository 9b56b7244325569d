"""Files that survive: written completely or not at all, locked, read with tolerance; and progress on the console.

Imports nothing of byolt; everything else may import it. Begin with `atomic.py`. `storage/` is about object storage.
"""
