"""Parts of `tools/report.py`: what it reads, figures, sections, the page. Begin with `sections.py`."""
