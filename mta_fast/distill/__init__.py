"""Distillation around the MTA loss: base losses and prompts."""
