"""Prompts with verifiers, used alike by SFT (what a perfect answer is), RL (what it is worth) and evaluation."""
