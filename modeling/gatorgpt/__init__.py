"""GatorGPT: MedAssistGPT's mathematics in other sizes, trained on children's stories."""
