"""Settings. `schema.py` declares every setting once; `fixed.py` says which a resumed run may not change.

The YAML files are recipes; each opens with a claim. Imports nothing of ours. Begin with `schema.py`.
"""
