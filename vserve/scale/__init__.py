"""The workers behind one front: how many there are and how their number changes.  Knows nothing of HTTP."""
