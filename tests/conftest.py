"""What every test shares: no network, and one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, so before any test module

import torch

# Tiny tensors gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other.
torch.set_num_threads(1)
