"""The network, and nothing else: scan, mamba, home, unet, and the authors' parameter layout."""
