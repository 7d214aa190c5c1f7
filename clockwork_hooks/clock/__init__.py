"""Which denoising step, branch and trajectory a call belongs to, and why a feature may not serve it."""
