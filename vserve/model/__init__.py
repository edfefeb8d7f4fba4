"""From a model on disk to logits: configuration, weights, layers and the forward pass.

May import torch, safetensors, ``vserve.kernels`` and ``vserve.errors``; must not know of HTTP, text, requests or
scheduling.
"""
