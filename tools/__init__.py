"""The commands that a user types, one file each. The parts of a command are in the folder named after it.

May import everything; only ablate.py imports train.py.
"""

from byolt.tools import environment  # noqa: F401  # before torch, also in installed commands
