"""What a run would need is computed here before anything runs: memory, work, traffic and time of every stage."""
