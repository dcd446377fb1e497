"""Evaluation through lm-eval, with tasks that need no download: ``python -m rat_ext.evaluate``. Extra ``[eval]``."""
