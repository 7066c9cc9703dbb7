"""What GatorGPT is checked against: MedAssistGPT's golden logits, which are its own under other tensor names."""

from dataclasses import replace

from modeling.medassist.reference import PUBLISHED
from modeling.reference import Reference

REFERENCE = Reference(golden=(replace(PUBLISHED, config={**PUBLISHED.config, "model_type": "gator-transformer"}),))
