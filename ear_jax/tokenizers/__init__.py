"""Images to tokens and back: LiteVAE, Lite-Hybrid, and what trains them."""
