"""What every test shares: no network, one thread, and no limit of Hypothesis that goes by the clock."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, so before any test module

import torch
from hypothesis import HealthCheck, settings

# Tiny tensors gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other.
torch.set_num_threads(1)

# On a busy machine a test is slow, and not wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
