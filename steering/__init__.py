"""VL-SAE steering: find the concepts image and text share in an LVLM's hidden states, and realign them."""
