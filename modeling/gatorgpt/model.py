"""GatorGPT as a trainable torch module: MedAssistGPT under its own name.

The published code differs from MedAssistGPT's in the names of two tensors, which matter to the import alone
(``published.py``). The configuration published with version 2 describes another network (no causal mask, another
norm); its weights were trained with this one.
"""

from modeling.gatorgpt.config import GatorGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM


class GatorGPTForCausalLM(MedAssistGPTForCausalLM):
    """GatorGPT with its tied head."""

    config_class = GatorGPTConfig
