"""The server's decisions: which devices take part, with how much work, and when to prune. Pure
functions over numpy.
"""
