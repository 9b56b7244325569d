"""Parts of `tools/report.py` and `tools/export.py`: pages, figures, model cards. Begin with `run.py`."""
