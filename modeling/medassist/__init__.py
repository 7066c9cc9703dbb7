"""MedAssistGPT: a decoder with RoPE, grouped-query attention, SwiGLU, RMSNorm and a tied head."""
