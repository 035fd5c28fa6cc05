"""Reinforcement learning of a policy on prompts: what a rollout becomes, how it is learned from, how that is judged."""
