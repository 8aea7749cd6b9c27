"""Scored rollouts of a model, turned into what it learns from."""
