"""Parts of `tools/show_views.py`. Begin with `samples.py`."""
