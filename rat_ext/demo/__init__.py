"""What ``python -m rat_ext`` runs: see :mod:`rat_ext.__main__`."""
