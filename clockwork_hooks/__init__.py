"""Clockwork Diffusion on any diffusion UNet."""
