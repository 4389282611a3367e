"""A run from its recipe to its folder: the task, the fleet, the loop and what is kept."""
