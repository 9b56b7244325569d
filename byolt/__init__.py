"""The installed name of the project: `byolt.pipelines`, `byolt.model`, `byolt.tools`, `byolt.configs`, `byolt.files`.

This folder holds links to the folders beside it, so that every module has one name, in a checkout and installed, and
nothing else enters the import path of whoever installs it. Nothing is imported here.
"""
