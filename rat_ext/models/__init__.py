"""The paper's language models for Hugging Face transformers. Importing this registers them with its Auto classes."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'rat_ext.models needs Hugging Face transformers: pip install "rat_ext[models]"', name="transformers"
    ) from None

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, configuration_utils

from .cache import RATModelCache
from .config import LAYER_TYPES, RATConfig
from .generator import Generator, Request
from .modeling import RATForCausalLM, RATModel, RATPreTrainedModel
from .official import load_official_checkpoint

# Trainer reads the config.json of a checkpoint as a configuration of no class in particular, which knows these types alone.
_known = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*_known, *(kind for kind in LAYER_TYPES if kind not in _known))

AutoConfig.register("rat", RATConfig, exist_ok=True)
AutoModel.register(RATConfig, RATModel, exist_ok=True)
AutoModelForCausalLM.register(RATConfig, RATForCausalLM, exist_ok=True)

__all__ = [
    "Generator",
    "RATConfig",
    "RATForCausalLM",
    "RATModel",
    "RATModelCache",
    "RATPreTrainedModel",
    "Request",
    "load_official_checkpoint",
]
