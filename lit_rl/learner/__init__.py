"""How an algorithm learns: gradient steps, target networks, reporting, refusals, signals."""
