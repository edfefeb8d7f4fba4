"""The OpenAI dialect over HTTP: requests checked, tokens turned into replies.  Event-loop thread only; no torch."""
