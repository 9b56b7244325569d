"""The fast views: decoded pixels and sampled parameters in, two normalized views out.

`inputs.py` is what every kernel reads. `cpu*.py` are compiled by numba, `gpu*.py` by Triton, which works through the
table of `jobs.py`; what differs between the two profiles has files of its own. The definitions that all are tested
against are in pipelines/torch_backend.py. May import views and configs. Begin with `make_views` in `cpu.py`.
"""
