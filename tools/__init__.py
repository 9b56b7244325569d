"""The commands that a user types, one file each; their parts are in the folders below.

May import everything but train.py.
"""
