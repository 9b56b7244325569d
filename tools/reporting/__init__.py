"""Parts of `tools/report.py`; `figures.py` also has the colors of all tools' pictures. Begin with `sections.py`."""
