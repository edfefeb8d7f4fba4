"""What talks to a running server over HTTP.  Starts fast: the standard library only."""
