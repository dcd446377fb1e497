"""The paper's language models for Hugging Face transformers. Importing this registers them with its Auto classes."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'rat_ext.models needs Hugging Face transformers: pip install "rat_ext[models]"', name="transformers"
    ) from None

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import RATModelCache
from .config import RATConfig
from .modeling import RATForCausalLM, RATModel, RATPreTrainedModel
from .official import load_official_checkpoint

AutoConfig.register("rat", RATConfig, exist_ok=True)
AutoModel.register(RATConfig, RATModel, exist_ok=True)
AutoModelForCausalLM.register(RATConfig, RATForCausalLM, exist_ok=True)

__all__ = [
    "RATConfig",
    "RATForCausalLM",
    "RATModel",
    "RATModelCache",
    "RATPreTrainedModel",
    "load_official_checkpoint",
]
