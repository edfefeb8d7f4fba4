"""What lets an operator see inside: progress and heartbeat.  Knows no engine and no HTTP."""
