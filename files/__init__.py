"""Files that survive: written whole or not at all, locked, read with tolerance. Imports nothing of ours.

Begin with `atomic.py`. Both pipelines/ and model/ stand on this room.
"""
