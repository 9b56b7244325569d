"""The fast views: decoded pixels and sampled parameters in, two normalized views out.

`recipe.py` and `jobs.py` are the inputs; `cpu*.py` are compiled by numba, `gpu*.py` by Triton, one file a profile. The
definitions that both are held to are in pipelines/torch_backend.py. Begin with `cpu.py`.
"""
