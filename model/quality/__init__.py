"""Evaluates an encoder: features, kNN, linear classifiers, scores, spectrum.

May import model/*.py, not model/run. Begin with `features.py`.
"""
