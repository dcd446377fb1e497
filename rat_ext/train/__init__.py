"""From text to a trained model, on transformers' Trainer: ``python -m rat_ext.train``. Extra ``[train]``."""
