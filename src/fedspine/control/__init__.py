"""What the server decides: who takes part, with how much, when to prune. Pure numpy functions."""
