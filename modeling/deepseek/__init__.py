"""DeepSeek-style models: latent attention (MLA), a mixture of experts, and multi-token prediction."""
