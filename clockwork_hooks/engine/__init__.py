"""Runs the calls of a wrapped UNet: attach, wrapper, engine, passes, hooks, compiled calls."""
