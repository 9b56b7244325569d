"""The data path. A training batch passes the files of this folder in this order:

    manifest  sources  order  views  backends (dali_backend, torch_backend or resident)  loader

`plain.py` and `subset.py` are for evaluation; `philox.py` is the random number generator. `formats/` reads bytes,
`remote/` reads them behind a URL, `kernels/` makes views, `convert/` makes shards. May import configs and files, never
model. Begin with `loader.py`.
"""
