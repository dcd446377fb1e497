"""The models of rat_ext on torchtitan: ``python -m torchtitan.train --module rat_ext.train.titan --config ...``.

Extra ``[titan]``. docs/scale.md says how to start a run, and what the two configurations need.
"""

try:
    import torchtitan  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torchtitan":
        raise
    raise ModuleNotFoundError(
        'rat_ext.train.titan needs torchtitan and Python 3.11: pip install "rat_ext[titan]"', name="torchtitan"
    ) from None

from .data import Shards
from .model import FLAVORS, HeadLoss, RATDecoder, model_registry
from .parallelize import SaveAttention, parallelize

__all__ = ["FLAVORS", "HeadLoss", "RATDecoder", "SaveAttention", "Shards", "model_registry", "parallelize"]
